"""Policies that use tiers which no policy of a name does."""

from spectrumkv_hf.policy import TIERS, Policy, Tier


class EveryTier(Policy):
    """Tokens in every tier, more in those that are less precise."""

    name = "every_tier"
    tiers = TIERS[:-1]

    def counts(self, tokens):
        counts = {tier: tokens * (1 + i) // 24 for i, tier in enumerate(self.tiers[:-1])}
        return counts | {self.tiers[-1]: tokens - sum(counts.values())}


class EveryTierOfTwoBitsOrMore(EveryTier):
    """For codecs that have no codes of 1 bit."""

    name = "every_tier_of_two_bits_or_more"
    tiers = TIERS[:-2]


class EveryTierAndDropped(EveryTier):
    name = "every_tier_and_dropped"
    tiers = TIERS


def all_in(tier: Tier) -> Policy:
    """Every token in one tier."""

    class AllIn(Policy):
        name = f"all_{tier.name}"

        def counts(self, tokens):
            return {tier: tokens}

    return AllIn(recent_window=8)
