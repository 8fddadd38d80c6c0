"""What is published, to print beside ours; nothing is fitted to it.

``ABSTRACT``: the paper's abstract (arXiv 2603.02885). The rest is second-hand, from summaries of
the paper, whose full text was not at hand.
"""

ABSTRACT = {"throughput, up to": 2.33, "memory, up to": 5.29}
RATIOS: dict[tuple[str, str], dict[str, float]] = {
    ("A40", "uniform"): {"hf_peft": 2.33, "nemo": 1.87, "sl_peft": 1.64},
    ("A40", "mixed"): {"hf_peft": 2.23, "nemo": 1.83, "sl_peft": 1.85},
    # The 5.29 is doubtful: the abstract has the same number for memory.
    ("H100-SXM", "uniform"): {"nemo": 5.29, "sl_peft": 2.31},
    ("H100-SXM", "mixed"): {"nemo": 3.69, "sl_peft": 1.94},
}
# Throughput lost when one part is switched off.
ABLATIONS: dict[str, dict[str, float]] = {
    "light": {"fusion": 0.36, "orchestration": 0.30, "alignment": 0.22},
    "heavy": {"fusion": 0.06, "orchestration": 0.25, "alignment": 0.34},
}
MEMORY_TASKS = {"muxtune": 32, "baselines fail at": 15}
