"""The command `lightning-gr`, a LightningCLI with a flag group for each method, and the variable `LIGHTNING_GR`."""
