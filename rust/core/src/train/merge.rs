//! Joining the regions of a pair in one shard, and recording what that changes about all pairs.
//!
//! A merge takes pairs of `a` and of `b` with their neighbours away, and adds pairs of the new token. What it takes
//! away is only counted. What it adds is also listed: each adjacency of the new token with a neighbour, once.

use super::neighbours::{Neighbour, Neighbours};
use super::occurrences::unpack;
use super::pair::{Count, NewPair, Pair, new_pair};
use super::regions::RegionMap;
use super::word::{Region, Word, has_anchor, positions_around, region_at};
use crate::error::Result;
use crate::grid::Offset;
use crate::memory;

/// Occurrences whose cache lines are loaded at once.
pub(super) const BLOCK: usize = 16;

/// Occurrences after which removals are summed up: a single cell has four neighbours, so a merge adds at most 9 to one
/// half of a number, and 7168 merges stay below 2^16.
pub(super) const MAX_OCCURRENCES_PER_SUM: usize = 7168;

/// One merge to apply.
#[derive(Debug, Clone, Copy)]
pub(super) struct MergeStep {
    pub pair: Pair,
    /// In oriented mode, the offset at which the pair is merged.
    pub offset: Option<Offset>,
    /// The new token.
    pub token: u32,
}

/// How many pairs of a token t with `a` or `b` a merge (a, b) takes away:
///
/// | index | pair |
/// |---|---|
/// | 0 | (a, t) |
/// | 1 | (t, a) |
/// | 2 | (b, t), if b is not a |
/// | 3 | (t, b), if b is not a |
///
/// If the token of the merge in the pair is of the codebook, the number has two halves. The low half counts all such
/// pairs, the high half those whose second region lies below the first, which has a meaning for pairs of single cells.
type Removals = [u32; 4];

/// The index of (a, t) in [`Removals`]; that of (t, a) is the next.
pub(super) const PAIRS_OF_A: usize = 0;

/// The index of (b, t) in [`Removals`]; that of (t, b) is the next.
pub(super) const PAIRS_OF_B: usize = 2;

/// What a removed pair of single cells adds besides 1, if the second lies below the first.
const BELOW: u32 = 1 << 16;

/// A removed pair: the other token and its index in [`Removals`].
pub(super) type RemovedPair = (u32, usize);

/// An adjacency of the new token: which pair, the other region's anchor, the new one's.
pub(super) type Adjacency = (NewPair, u32, u32);

/// What a merge changes about all pairs in a shard.
#[derive(Debug)]
pub(super) struct PairDeltas {
    /// Per token; all 0 between merges.
    removals: Vec<Removals>,
    /// Per pair with the new token, the number of its adjacencies; all 0 between merges.
    counts: Vec<u32>,
    /// The first `num_new_pairs` are the pairs with the new token, each once.
    new_pairs: Vec<NewPair>,
    num_new_pairs: usize,
    /// The first `num_adjacencies` are those of the new token.
    adjacencies: Vec<Adjacency>,
    num_adjacencies: usize,
}

/// What memory is for, in messages.
const DELTAS: &str = "what a merge changes";

impl PairDeltas {
    /// No changes, for `tokens` tokens with the border.
    pub fn new(tokens: usize) -> Result<Self> {
        Ok(Self {
            removals: memory::zeros(tokens, DELTAS)?,
            counts: memory::zeros(2 * tokens, DELTAS)?,
            // One more, which is written but does not count.
            new_pairs: memory::zeros(2 * tokens + 1, DELTAS)?,
            num_new_pairs: 0,
            adjacencies: Vec::new(),
            num_adjacencies: 0,
        })
    }

    /// Starts a merge.
    pub fn start(&mut self) {
        (self.num_adjacencies, self.num_new_pairs) = (0, 0);
    }

    /// The pairs with the new token, each once.
    pub fn new_pairs(&self) -> &[NewPair] {
        &self.new_pairs[..self.num_new_pairs]
    }

    /// The number of adjacencies of a pair with the new token.
    pub fn count(&self, pair: NewPair) -> u32 {
        self.counts[pair as usize]
    }

    /// A recorder for at most `max_adjacencies` more adjacencies of the new token.
    #[inline]
    fn recorder(&mut self, max_adjacencies: usize, token: u32) -> Result<DeltaRecorder<'_>> {
        // One more, which is written but does not count.
        let end = self.num_adjacencies + max_adjacencies + 1;
        if self.adjacencies.len() < end {
            memory::resize(&mut self.adjacencies, 2 * end, (0, 0, 0), DELTAS)?;
        }
        let Self { removals, adjacencies, num_adjacencies, .. } = self;
        Ok(DeltaRecorder { token, removals, adjacencies, len: *num_adjacencies })
    }

    /// Counts the adjacencies that come after the first `start`. Branchless.
    fn count_adjacencies(&mut self, start: usize) {
        let Self { counts, new_pairs, num_new_pairs, adjacencies, num_adjacencies, .. } = self;
        for &(pair, ..) in &adjacencies[start..*num_adjacencies] {
            let count = &mut counts[pair as usize];
            new_pairs[*num_new_pairs] = pair;
            *num_new_pairs += usize::from(*count == 0);
            *count += 1;
        }
    }

    /// Adds the removals of these pairs since the last [`PairDeltas::clear_removals`] to `sums`.
    pub fn sum_removals(
        &self,
        Pair { a, b, .. }: Pair,
        base_vocab_size: u32,
        removed_pairs: &[RemovedPair],
        sums: &mut [Count],
    ) {
        for (sum, &(token, index)) in sums.iter_mut().zip(removed_pairs) {
            let number = self.removals[token as usize][index];
            // Only with a token of the codebook the number has two halves.
            let token_of_merge = if index < PAIRS_OF_B { a } else { b };
            *sum += if token_of_merge < base_vocab_size {
                Count { total: (number % BELOW).into(), below: (number / BELOW).into() }
            } else {
                Count { total: number.into(), below: 0 }
            };
        }
    }

    /// Sets the removals of all tokens that this merge has met to 0.
    pub fn clear_removals(&mut self, MergeStep { pair: Pair { a, b, .. }, token, .. }: MergeStep) {
        // Whatever lost a pair to the merge gained one with the new token.
        let other_tokens = self.new_pairs[..self.num_new_pairs].iter().map(|pair| pair / 2);
        for token in other_tokens.chain([a, b, token]) {
            self.removals[token as usize] = Removals::default();
        }
    }

    /// Ends a merge: hands the adjacencies of `indexed_pairs` to `list`, as (number of the pair from 1, anchor, anchor),
    /// with the number of adjacencies of each of these pairs.
    pub fn take_adjacencies(
        &mut self,
        indexed_pairs: &[NewPair],
        list: impl FnOnce(&[usize], &[Adjacency]) -> Result<()>,
    ) -> Result<()> {
        let Self { counts, new_pairs, num_new_pairs, adjacencies, num_adjacencies, .. } = self;
        let lens = indexed_pairs.iter().map(|&pair| counts[pair as usize] as usize);
        let lens = memory::collect(lens, DELTAS)?;
        for &pair in &new_pairs[..*num_new_pairs] {
            counts[pair as usize] = 0;
        }
        if indexed_pairs.is_empty() {
            return Ok(());
        }
        // The table of counts now tells the number of a pair. Adjacencies of other pairs are left out, branchless.
        for (number, &pair) in (1..).zip(indexed_pairs) {
            counts[pair as usize] = number;
        }
        let adjacencies = &mut adjacencies[..*num_adjacencies];
        let mut len = 0;
        for i in 0..adjacencies.len() {
            let (pair, z, x) = adjacencies[i];
            let number = counts[pair as usize];
            adjacencies[len] = (number, z, x);
            len += usize::from(number > 0);
        }
        list(&lens, &adjacencies[..len])?;
        for &pair in indexed_pairs {
            counts[pair as usize] = 0;
        }
        Ok(())
    }
}

/// Writes to [`PairDeltas`] with the numbers that change most in registers.
struct DeltaRecorder<'a> {
    /// The new token.
    token: u32,
    removals: &'a mut [Removals],
    adjacencies: &'a mut [Adjacency],
    len: usize,
}

impl DeltaRecorder<'_> {
    /// Records a neighbour of the region of the new token at `x`: the pairs of its token that are taken away, as
    /// (index, number), and if it `is_new` as a neighbour, an adjacency, in which it comes before `x` (`is_before`) or
    /// after it. Branchless: the adjacency is always written, and counts if the length grows.
    #[inline]
    #[expect(clippy::needless_bitwise_bool, reason = "branchless")]
    fn add<const N: usize>(
        &mut self,
        (z, other_token): Region,
        removals: [(usize, u32); N],
        x: u32,
        is_before: bool,
        is_new: bool,
    ) {
        // Two regions of the new token are one pair, whichever comes first.
        let is_before = is_before & (other_token != self.token);
        // What is taken away.
        let token_removals = &mut self.removals[other_token as usize];
        for (index, number) in removals {
            let sum = &mut token_removals[index % 4];
            *sum = sum.wrapping_add(number);
        }
        // What is added.
        self.adjacencies[self.len] = (new_pair(other_token, is_before), z, x);
        self.len += usize::from(is_new);
    }
}

/// Joins single cells, the first of which are in `block`: `a` with `b` right of it, or else below it. Returns the
/// number of merges.
#[expect(clippy::needless_bitwise_bool, reason = "branchless")]
pub(super) fn join_cells<W: Word>(
    regions: &mut RegionMap<W>,
    step: MergeStep,
    stride: u32,
    block: &[u32],
    deltas: &mut PairDeltas,
) -> Result<u64> {
    let MergeStep { pair: Pair { a, b, .. }, offset, token } = step;
    let is_merged_at = |dy: i32, dx: i32| offset.is_none_or(|offset| offset == Offset { dy, dx });
    let (merges_right, merges_below) = (is_merged_at(0, 1), is_merged_at(1, 0));
    let pairs_of_b = if a == b { PAIRS_OF_A } else { PAIRS_OF_B };
    // Leave out those that an earlier merge has taken.
    let mut memory = [0; BLOCK];
    let block = regions.filter_cell_pairs(block, (a, b), stride, &mut memory);
    let (mut num_merges, mut num_below) = (0, 0);
    let (cells, border) = regions.cells_to_merge();
    let start = deltas.num_adjacencies;
    let mut recorder = deltas.recorder(6 * block.len(), token)?;
    for &x in block {
        // A merge of this block may have taken one of them meanwhile.
        let is_right = has_anchor(cells, x + 1, b) & merges_right;
        let is_below = has_anchor(cells, x + stride, b) & merges_below;
        if !has_anchor(cells, x, a) | !(is_right | is_below) {
            continue;
        }
        num_merges += 1;
        num_below += u32::from(!is_right);
        let distance = if is_right { 1 } else { stride };
        let outer_regions = positions_around(x, distance, stride).map(|q| region_at(cells, q));
        cells[x as usize] = W::new(token, 0);
        cells[(x + distance) as usize] = W::new(token, distance);
        record_joined_cells(&mut recorder, outer_regions, x, distance, pairs_of_b, border);
    }
    // The pairs (a, b) themselves.
    recorder.removals[b as usize][PAIRS_OF_A] += num_merges + num_below * BELOW;
    deltas.num_adjacencies = recorder.len;
    deltas.count_adjacencies(start);
    Ok(num_merges.into())
}

/// Records what joining the cells `x` and `x + distance` changes, given the regions at [`positions_around`] them. Each
/// region is counted once among those around x, and once among those around y. Branchless.
#[expect(clippy::inline_always, reason = "a call for every merge costs 2 % of the training time")]
#[inline(always)]
#[expect(clippy::needless_bitwise_bool, reason = "branchless")]
fn record_joined_cells(
    recorder: &mut DeltaRecorder<'_>,
    [u, v, w, p, q, r]: [Region; 6],
    x: u32,
    distance: u32,
    pairs_of_b: usize,
    border: u32,
) {
    let y = x + distance;
    let is_right = distance == 1;
    let is_inside = |region: Region| region.1 != border;
    // Around x: above, left, and across from y.
    let (is_counted_u, is_counted_v) = (is_inside(u), is_inside(v) & (v.0 != u.0));
    let is_counted_w = is_inside(w) & (w.0 != u.0) & (w.0 != v.0);
    // Around y: across from x, right, and below.
    let (is_counted_p, is_counted_q) = (is_inside(p), is_inside(q) & (q.0 != p.0));
    let is_counted_r = is_inside(r) & (r.0 != p.0) & (r.0 != q.0);
    let is_apart_from_x = |z: u32| (z != u.0) & (z != v.0) & (z != w.0);
    let index_at_y = |z: u32| pairs_of_b + usize::from(z < y);
    // A neighbour across lies below or above if y lies to the right, and beside it otherwise.
    let across_count = 1 + u32::from(is_right) * BELOW;
    let number_if = |condition: bool, number: u32| u32::from(condition).wrapping_neg() & number;
    // What is above x or left of it is anchored before it.
    recorder.add(u, [(PAIRS_OF_A + 1, number_if(is_counted_u, 1 + BELOW))], x, true, is_counted_u);
    recorder.add(v, [(PAIRS_OF_A + 1, u32::from(is_counted_v))], x, true, is_counted_v);
    recorder.add(
        w,
        [(PAIRS_OF_A + usize::from(w.0 < x), number_if(is_counted_w, across_count))],
        x,
        w.0 < x,
        is_counted_w,
    );
    let removal = (index_at_y(p.0), number_if(is_counted_p, across_count));
    recorder.add(p, [removal], x, p.0 < x, is_counted_p & is_apart_from_x(p.0));
    let removal = (index_at_y(q.0), u32::from(is_counted_q));
    recorder.add(q, [removal], x, q.0 < x, is_counted_q & is_apart_from_x(q.0));
    let removal = (index_at_y(r.0), number_if(is_counted_r, 1 + BELOW));
    recorder.add(r, [removal], x, r.0 < x, is_counted_r & is_apart_from_x(r.0));
}

/// Joins regions of any size, whose anchors are in `block`. `WITH_CELL` if one of each two is a single cell. Returns
/// the number of merges.
pub(super) fn join_regions<const WITH_CELL: bool, W: Word>(
    regions: &mut RegionMap<W>,
    step: MergeStep,
    stride: u32,
    block: &[u64],
    neighbours: &mut Neighbours,
    deltas: &mut PairDeltas,
) -> Result<u64> {
    let MergeStep { pair, offset, token } = step;
    let Pair { a, b, max_sizes, .. } = pair;
    let distance =
        offset.map(|offset| (offset.dy as u32).wrapping_mul(stride).wrapping_add(offset.dx as u32));
    let pairs_of_b = if a == b { PAIRS_OF_A } else { PAIRS_OF_B };
    let base_vocab_size = regions.base_vocab_size;
    let has_two_cells = max_sizes.map(|size| size == 2);
    let max_cells = pair.max_size().min(regions.len() as u64);
    neighbours.reserve(max_cells as usize)?;
    let start = deltas.num_adjacencies;
    let mut num_merges = 0;
    for &anchors in block {
        let (x, y) = unpack(anchors);
        // An earlier merge may have taken one of them.
        let (cells, border) = regions.cells_to_merge();
        if !(has_anchor(cells, x, a) & has_anchor(cells, y, b)) {
            continue;
        }
        // Oriented mode: the distance is compared first, since that is quick; two offsets may have the same distance.
        if distance.is_some_and(|distance| distance != y - x)
            || offset.is_some_and(|offset| regions.offset(x, y) != offset)
        {
            continue;
        }
        let (cells, _) = regions.cells_to_merge();
        num_merges += 1;
        let number = neighbours.merge(cells, (x, y), has_two_cells, stride, token);
        let mut recorder = deltas.recorder(number, token)?;
        neighbours.for_each(|Neighbour { region, beside_x, beside_y }| {
            let z = region.0;
            let (mut removals_x, mut removals_y) = (u32::from(beside_x), u32::from(beside_y));
            if WITH_CELL {
                // Adjacent single cells that do not follow each other in a row are in a column.
                let below_count = |x: u32| u32::from(z.wrapping_sub(x).wrapping_add(1) & !2 != 0) * BELOW;
                removals_x *= 1 + u32::from(a < base_vocab_size) * below_count(x);
                removals_y *= 1 + u32::from(b < base_vocab_size) * below_count(y);
            }
            let index_of_x = PAIRS_OF_A + usize::from(z < x);
            let index_of_y = pairs_of_b + usize::from(z < y);
            let removals = [(index_of_x, removals_x), (index_of_y, removals_y)];
            recorder.add(region, removals, x, z < x, region.1 != border);
        });
        deltas.num_adjacencies = recorder.len;
    }
    neighbours.check()?;
    deltas.count_adjacencies(start);
    // The pairs (a, b) themselves.
    deltas.removals[b as usize][PAIRS_OF_A] += num_merges;
    Ok(num_merges.into())
}
