"""Evaluation of a policy on benchmarks: sampled, graded, stored sample by sample, summarised with intervals."""
