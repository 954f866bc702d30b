"""The only part of the control plane that imports torch: base models, the LoRA layer, adapter files."""
