"""megavlm trains vision-language models, at scale, on megatron-core."""

__version__ = "0.2.0"
