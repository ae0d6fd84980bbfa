"""The commands `lightning-gr`, LightningCLI with a flag group per method, and `LIGHTNING_GR`."""
