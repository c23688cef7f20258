"""Stage: DPO, the policy learns the rankings themselves."""
