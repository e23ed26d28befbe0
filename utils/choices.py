"""What can be chosen by name, and what is chosen by default: flags offer it, modules act on it.

Nothing is imported here, so that a command line is read and answered before torch is loaded.
"""

OPTIMIZERS = ("SGD", "Adam", "AdamW")
NOMINAL_BATCH = 64  # images whose gradients one optimizer step sums up
AUTO_BATCH = -1  # what fits
ON_NAN = ("stop", "recover")
AMP_CHOICES = ("auto", "off", "bf16", "fp16")

# "keep": the classic rule, whatever touches a shortcut stays as it is.
# "group": channels added by a shortcut are cut together, all other convolutions are free.
SHORTCUT_RULES = ("keep", "group")

# How the sparsity penalty acts; slimming.py describes both.
MODES = ("subgradient", "proximal")
# How the rate changes over the run. "linear": the classic decay to a tenth. "hold": full for half
# of the run, then linearly to 0 after nine tenths of it, so that the gammas that stay recover; the
# betas are pulled throughout.
SCHEDULES = ("linear", "hold")
DEFAULT_COST_POWER = 0.25  # of train.py; why: benchmarks/slimming.md
AUTO_SHARE = 0.6  # of the gammas, after which --sparsity_rate auto lets the others go

IMPORTANCES = ("gamma", "error", "error-per-cost")
DEFAULT_IMPORTANCE = "error-per-cost"
COMPENSATIONS = ("none", "constant", "mean", "linear")
