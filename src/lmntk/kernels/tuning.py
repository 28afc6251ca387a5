"""Numbers that trade time for memory and change a kernel by rounding only, each with its unit and its measurement."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tuning:
    """The tunable numbers of the engines and layers; docs/explanation/performance.md has measurements of the defaults.

    Bytes and tokens bound a choice, shares are fractions of the memory budget, efficiencies are fractions of the rate
    of large square matrix products (`timing.product_flops`).

    Attributes:
        max_x_tile: Largest X tile of the factored engine, in examples. A larger X tile re-forms the train gradients
            less often, but beyond this the page faults on fresh memory cost more than that saves.
        min_x_tile: X examples that a train tile is made smaller for, where slices of a kernel are kept apart.
        max_x_tile_bytes: Largest factors of an X tile, in bytes, where most layers form dense gradients.
        gram_x_tile_bytes: The same where most layers take the Gram path, which re-forms nothing.
        batch_tokens: Tokens that are propagated together: enough for large products, few enough for small activations.
        small_model_batch_tokens: The same for models whose tokens take so little that `batch_bytes` holds more: calls
            cost them more than products.
        batch_bytes: Factors of a batch of a small model, in bytes.
        max_activation_bytes: Largest activations of a batch, in bytes.
        activation_factor: Peak activation memory of a forward and backward pass, as a multiple of the factors kept.
        activation_share: Share of the budget that activations may take.
        buffer_share: Share of the budget that each of the three buffers for dense gradients may take.
        slice_share: Share of the budget that slices of a kernel, kept apart, may take in the jacobian engine.
        fallback_share: Share of the budget for the gradients of parameters of unknown layers, if there are any.
        fragmentation: Memory that many small tensors take, as a multiple of their sizes.
        max_buffer_bytes: Size of a buffer beyond which products get no faster.
        min_buffer_bytes: Least size of a buffer: products of vectors and of single outer products use it too.
        product_efficiency: Efficiency of forming and contraction together, for estimates of time.
        dense_efficiency: Efficiency of forming and contraction relative to Gram matrices' larger products, which
            decides between the two for each layer.
        dense_gradient_batch: X gradients (examples times logits) that are formed together.
        sign_bits_flops: Flops of products of signs from which they are counted as bits, whose loops take two seconds to
            compile for the first time.
        sign_cache_bytes: What each thread forms before signs are packed, in bytes: within the cache of a core.
        cache_bytes: What is formed together before it is multiplied: within the processor's cache, since writing it
            to memory and reading it again takes a quarter longer.
        min_weight_rows: Rows of a weight below which products are slow.
        gram_entry_flops: Cost of an entry of a Gram matrix beyond its products, in flops: it is multiplied, summed
            and moved.
        gram_tokens: Tokens of either side whose Gram matrix is formed at a time: enough for large products, few
            enough for the cache.
        jacobian_x_tile: X examples whose gradients the jacobian engine holds at a time.
        jacobian_batch: Examples whose Jacobians `vmap` forms at a time; these stand in memory twice.
        mean_tokens: Tokens of an example, assumed where examples have no lengths.
        max_padding: Share of a batch that may be padding: smaller batches cost more than the padding saved.
        min_padding_tokens: Padding in tokens that is always allowed: less work than reading all weights once more.
        num_autograd_probes: Examples of the train side on which layers are compared with autograd.
        probe_batch: Examples in a batch of them, and the number of probes of the other side.
        probe_tokens: Tokens in a batch of them.
        probe_gradient_bytes: Gradients of parameters that a comparison holds at a time, in bytes.
        probe_gradient_share: Share of the budget that these gradients may take: nothing else is held yet.
    """

    max_x_tile: int = 256
    min_x_tile: int = 16
    max_x_tile_bytes: int = 2**31
    gram_x_tile_bytes: int = 2**29
    batch_tokens: int = 1024
    small_model_batch_tokens: int = 4096
    batch_bytes: int = 2**26
    max_activation_bytes: int = 2**30
    activation_factor: float = 2.0
    activation_share: float = 0.15
    buffer_share: float = 0.12
    slice_share: float = 0.25
    fallback_share: float = 0.25
    fragmentation: float = 1.1
    max_buffer_bytes: int = 2**29
    min_buffer_bytes: int = 2**22
    product_efficiency: float = 0.65
    dense_efficiency: float = 0.6
    dense_gradient_batch: int = 256
    sign_bits_flops: float = 2e11
    sign_cache_bytes: int = 2**22
    cache_bytes: int = 2**24
    min_weight_rows: int = 64
    gram_entry_flops: float = 350
    gram_tokens: int = 1024
    jacobian_x_tile: int = 32
    jacobian_batch: int = 8
    mean_tokens: int = 30
    max_padding: float = 0.08
    min_padding_tokens: int = 32
    num_autograd_probes: int = 6
    probe_batch: int = 3
    probe_tokens: int = 1024
    probe_gradient_bytes: int = 2**30
    probe_gradient_share: float = 0.5


DEFAULT_TUNING = Tuning()
