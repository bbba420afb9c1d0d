"""The vision-language model, from megatron-core layers."""
