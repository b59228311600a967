"""``Blackjack-jrl``: the card game of the textbooks, its probabilities worked out exactly."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jrl.envs.finite import Outcomes, Start, from_outcomes, replace_params
from jrl.envs.registry import register
from jrl.types import Array, Discrete, Environment


class CardParams(NamedTuple):
    """``max_steps``: int32, time limit; no hand is that long."""

    max_steps: Any = 100


def _dealer(showing: int, cards: np.ndarray) -> np.ndarray:
    """How the dealer ends: probabilities of 17, 18, 19, 20, 21 and of going bust."""
    ends = np.zeros(6)
    open_hands = {(showing, showing == 1): 1.0}  # (sum with aces as 1, holds an ace) -> probability
    while open_hands:
        following: dict[tuple[int, bool], float] = {}
        for (total, ace), chance in open_hands.items():
            for card, share in enumerate(cards, 1):
                hard, has_ace = total + card, ace or card == 1
                best = hard + 10 if has_ace and hard <= 11 else hard
                if best >= 17:
                    ends[min(best - 17, 5)] += chance * share
                else:
                    hand = (hard, has_ace)
                    following[hand] = following.get(hand, 0.0) + chance * share
        open_hands = following
    return ends


def blackjack_state(player: Any, dealer: Any, usable_ace: Any) -> Any:
    """Return the index of a state: the player's sum 4 … 21, the dealer's card 1 … 10, a usable ace."""
    return ((player - 4) * 10 + dealer - 1) * 2 + usable_ace


def blackjack(*, params: Any = None, raw: bool = False) -> Environment:
    """Draw cards (1) or stick (0) to come near 21, from an infinite deck, against a dealer who sticks at 17.

    Sutton and Barto 2018, example 5.1: reward 1, 0 or −1 at the end of a hand, no discount. The higher sum
    wins; a natural is an ordinary 21. 360 states, see :func:`blackjack_state`.
    """
    name = "Blackjack-jrl"
    cards = np.array([1.0] * 9 + [4.0]) / 13
    ends = np.array([_dealer(showing, cards) for showing in range(1, 11)])
    # won[p, d]: chance that a player who sticks at p beats the dealer who shows d.
    totals, final = np.arange(4, 22)[:, None], np.arange(17, 22)
    won = ends[:, 5] + np.stack([ends[:, :5] @ (final < p) for p in totals[:, 0]])
    drawn = np.stack([ends[:, :5] @ (final == p) for p in totals[:, 0]])

    deal = np.zeros(360)
    for first in range(1, 11):
        for second in range(1, 11):
            ace = first == 1 or second == 1
            for showing in range(1, 11):
                chance = cards[first - 1] * cards[second - 1] * cards[showing - 1]
                # Two aces: 12, the one usable.
                deal[blackjack_state(first + second + 10 * ace, showing, int(ace))] += chance

    win, draw_, start = (jnp.asarray(x, jnp.float32) for x in (won, drawn, deal))
    deck, card = jnp.asarray(cards, jnp.float32), jnp.arange(1, 11)

    def outcomes(state: Array, action: Array, params: CardParams) -> Outcomes:
        usable, dealer, player = state % 2, state // 2 % 10, state // 20 + 4
        # Hitting: an ace counts 11 where that does not go over.
        total = player + card
        as_eleven = (card == 1) & (total + 10 <= 21)
        total = jnp.where(as_eleven, total + 10, total)
        spends = (total > 21) & (usable == 1)
        total, has_ace = jnp.where(spends, total - 10, total), ((usable == 1) & ~spends) | as_eleven
        bust = total > 21
        hit_state = blackjack_state(jnp.minimum(total, 21), dealer + 1, has_ace.astype(jnp.int32))
        chance_win, chance_draw = win[player - 4, dealer], draw_[player - 4, dealer]
        stuck = (
            jnp.array([0.0] * 10)
            .at[:3]
            .set(jnp.stack([chance_win, chance_draw, 1.0 - chance_win - chance_draw]))
        )
        hits = action == 1
        return Outcomes(
            probability=jnp.where(hits, deck, stuck),
            next_state=jnp.where(hits & ~bust, hit_state, state),
            reward=jnp.where(hits, jnp.where(bust, -1.0, 0.0), jnp.array([1.0, 0.0, -1.0] + [0.0] * 7)),
            terminated=jnp.where(hits, bust, True),
        )

    def first_hand(params: CardParams) -> Start:
        return Start(start, jnp.arange(360))

    params = replace_params(CardParams(), params, name)
    return from_outcomes(outcomes, first_hand, 360, params, Discrete(2), name, raw=raw)


register("Blackjack-jrl", blackjack)
