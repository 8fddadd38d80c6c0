"""MuxTune: many fine-tuning tasks multiplexed on one frozen backbone."""

__version__ = "0.1.0"
