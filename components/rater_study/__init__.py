"""Stage: does the reward model hold for raters whom it never saw?"""
