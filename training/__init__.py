"""Training on Hugging Face's Trainer: `memzoo train CONFIG.yaml` and the parts it is made of."""
