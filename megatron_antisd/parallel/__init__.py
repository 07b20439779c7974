"""What several ranks compute together: vocabulary-parallel scores, exact global statistics, the layouts of training."""
