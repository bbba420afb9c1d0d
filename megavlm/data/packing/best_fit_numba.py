"""The inner loop of ``best_fit`` as machine code. Imported only if numba is installed."""

from __future__ import annotations

import numba
import numpy as np

# Multiplying a power of two by this number brings a different run of six bits to its top for each
# (a de Bruijn sequence).
DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)
LOWEST_BIT = np.zeros(64, np.int64)
LOWEST_BIT[[(1 << bit) * int(DE_BRUIJN) % 2**64 >> 58 for bit in range(64)]] = np.arange(64)


@numba.njit(cache=True)
def _lowest_bit(word):
    """Return the index of the lowest bit that is set in a word that is not zero."""
    return LOWEST_BIT[((word & (~word + np.uint64(1))) * DE_BRUIJN) >> np.uint64(58)]


@numba.njit(cache=True)
def _first_from(bits, summary, need):
    """Return the lowest bit that is set in ``bits`` at ``need`` or above, or -1. A bit of
    ``summary`` says which words of ``bits`` have any.
    """
    everything = ~np.uint64(0)
    word = need >> 6
    found = bits[word] & (everything << np.uint64(need & 63))
    if found == 0:
        group = (word + 1) >> 6
        words = summary[group] & (everything << np.uint64((word + 1) & 63))
        while words == 0:
            group += 1
            if group == len(summary):
                return -1
            words = summary[group]
        word = (group << 6) + _lowest_bit(words)
        found = bits[word]
    return (word << 6) + _lowest_bit(found)


@numba.njit(cache=True)
def _set_bit(bits, summary, index):
    """Set a bit, and that of its word in the summary."""
    bits[index >> 6] |= np.uint64(1) << np.uint64(index & 63)
    summary[index >> 12] |= np.uint64(1) << np.uint64((index >> 6) & 63)


@numba.njit(cache=True)
def _clear_bit(bits, summary, index):
    """Clear a bit, and that of its word in the summary if it was the last of the word."""
    bits[index >> 6] &= ~(np.uint64(1) << np.uint64(index & 63))
    if bits[index >> 6] == 0:
        summary[index >> 12] &= ~(np.uint64(1) << np.uint64((index >> 6) & 63))


@numba.njit(cache=True)
def best_fit(tokens, tiles, order, capacity, tile_cap, unit):
    """Pack by best fit in the given order: int32 bin of each sample, and the number of bins. A row
    of tables is of bins with ``unit`` numbers of free tiles.

    Scores are whole numbers, so that every machine finds the same bins: free tokens x tile cap +
    free tiles x capacity. Among bins that leave the same room, the one that got there last is
    taken.
    """
    words = (capacity >> 6) + 1
    rows = tile_cap // unit + 1
    bits = np.zeros((rows, words), np.uint64)
    # One word more than needed: the search may look one word past the last word.
    summary = np.zeros((rows, (words >> 6) + 1), np.uint64)
    newest = np.full((rows, capacity + 1), -1, np.int32)
    # Not below the most free tokens of a row's bins: most rows hold nothing large enough, and are
    # passed over by one comparison.
    most_left = np.full(rows, -1, np.int64)
    before = np.empty(len(tokens), np.int32)
    free_tiles = np.empty(len(tokens), np.int64)
    bin_of = np.empty(len(tokens), np.int32)
    bins = 0
    tile_scale = max(tile_cap, 1)
    for sample in order:
        need = np.int64(tokens[sample])
        need_tiles = np.int64(tiles[sample])
        best_row = -1
        best_left = 0
        best_score = 2**62
        for row in range((need_tiles + unit - 1) // unit, rows):
            spare = (row * unit - need_tiles) * capacity
            if spare >= best_score:
                break
            if most_left[row] < need:
                continue
            left = _first_from(bits[row], summary[row], need)
            if left < 0:
                most_left[row] = need - 1
            elif (left - need) * tile_scale + spare < best_score:
                best_row = row
                best_left = left
                best_score = (left - need) * tile_scale + spare
        if best_row < 0:
            chosen = bins
            free_tiles[chosen] = tile_cap
            best_left = capacity
            bins += 1
        else:
            chosen = newest[best_row, best_left]
            newest[best_row, best_left] = before[chosen]
            if before[chosen] < 0:
                _clear_bit(bits[best_row], summary[best_row], best_left)
        free_tiles[chosen] -= need_tiles
        row = free_tiles[chosen] // unit
        left = best_left - need
        most_left[row] = max(most_left[row], left)
        before[chosen] = newest[row, left]
        newest[row, left] = chosen
        _set_bit(bits[row], summary[row], left)
        bin_of[sample] = chosen
    return bin_of, bins
