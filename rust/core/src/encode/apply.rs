//! Applying the merges to one grid.
//!
//! Merges are applied in the order learned, but only those that can match:
//! 1. At the start, the pairs of neighbouring cells that some merge joins are listed, and those merges become pending.
//! 2. The lowest pending merge is taken. Its pairs are looked for around the regions of the newer of its two tokens,
//!    whose anchors were noted when they were made.
//! 3. If it has joined any, the merges of its token with tokens that are not newer become pending. A merge's token is
//!    in no earlier merge, so every merge that can match is pending before its turn, and one pass equals applying merge
//!    after merge.
//! 4. When no merge is pending, the tokens at the anchors are the result.
//!
//! A queue of pairs would be filled mostly in vain, since most of a region's pairs are gone when the turn of their
//! merge comes. The pairs of single cells are listed because no merge made these cells.

use std::ops::Range;

use super::merges::MergeIndex;
use super::options::{Dropout, EncodeOptions};
use super::workspace::{END, NO_TOKEN, Workspace, cell_pair_positions, ensure_len, pack, set_bit, unpack};
use crate::error::Result;
use crate::grid::{Grid, Regions};
use crate::interrupt::Interrupt;
use crate::vocabulary::MergeMode;

/// Regions between two looks at the interrupt flag.
const CHECK_INTERVAL: usize = 1 << 12;

/// No distance between two positions is as large.
const MAX_DISTANCE: u64 = 1 << 31;

/// The merge that is being applied.
#[derive(Clone, Copy)]
struct MergeStep {
    a: u32,
    b: u32,
    /// The token that it makes.
    token: u32,
    size_a: u32,
    size_b: u32,
    dropout: Option<StepDropout>,
}

/// Dropout of one merge in one grid.
#[derive(Clone, Copy)]
struct StepDropout {
    dropout: Dropout,
    grid: u64,
    merge: u32,
    stride: u32,
    width: u32,
}

impl MergeStep {
    /// Whether dropout skips the regions anchored at two positions.
    #[inline]
    fn skips(&self, x: u32, y: u32) -> bool {
        self.dropout.is_some_and(|StepDropout { dropout, grid, merge, stride, width }| {
            let cell = |p: u32| (p / stride - 1) * width + p % stride;
            dropout.skips(grid, merge, cell(x), cell(y))
        })
    }
}

impl Workspace {
    /// Appends a grid's tokens to `values`. Grid `index` of a batch has its own dropout. After an error the workspace
    /// must not be used again.
    pub fn encode(
        &mut self,
        merges: &MergeIndex,
        grid: &Grid,
        index: u64,
        options: &EncodeOptions,
        interrupt: &Interrupt,
        values: &mut Vec<u32>,
    ) -> Result<Option<Regions>> {
        match merges.merge_mode {
            MergeMode::Pair => self.encode_in_mode::<false>(merges, grid, index, options, interrupt, values),
            MergeMode::Oriented => {
                self.encode_in_mode::<true>(merges, grid, index, options, interrupt, values)
            }
        }
    }

    fn encode_in_mode<const ORIENTED: bool>(
        &mut self,
        merges: &MergeIndex,
        grid: &Grid,
        index: u64,
        options: &EncodeOptions,
        interrupt: &Interrupt,
        values: &mut Vec<u32>,
    ) -> Result<Option<Regions>> {
        // 1. Every cell is a region; find the merges of neighbouring cells.
        self.load_grid::<ORIENTED>(merges, grid, options.regions)?;
        self.list_cell_pairs(merges, interrupt)?;
        let (stride, width) = (self.stride as u32, self.width as u32);
        for word in 0..merges.len().div_ceil(64) {
            // A merge sets the bits of later ones, perhaps in this very word.
            while self.pending_merges[word] != 0 {
                interrupt.check()?;
                // 2. Apply the lowest pending merge.
                let merge = word as u32 * 64 + self.pending_merges[word].trailing_zeros();
                self.pending_merges[word] &= self.pending_merges[word] - 1;
                let entry = merges.entry(merge);
                let step = MergeStep {
                    a: entry.a,
                    b: entry.b,
                    token: merges.token(merge),
                    size_a: entry.size_a,
                    size_b: entry.size_b,
                    dropout: options.dropout.map(|dropout| StepDropout {
                        dropout,
                        grid: index,
                        merge,
                        stride,
                        width,
                    }),
                };
                let start = self.num_anchors;
                self.apply::<ORIENTED>(merges, merge, &step, interrupt)?;
                // 3. Its token makes other merges pending.
                if self.num_anchors > start {
                    let count = (self.num_anchors - start) as u32;
                    self.anchors_of_merge[merge as usize] = (start as u32, count);
                    for &successor in merges.successors(entry) {
                        set_bit(&mut self.pending_merges, successor);
                    }
                }
            }
        }
        // 4. Collect the tokens.
        let start = values.len();
        self.append_tokens::<ORIENTED>(values)?;
        options.regions.then(|| self.regions::<ORIENTED>(merges, &values[start..])).transpose()
    }

    /// Applies one merge to the grid.
    #[inline]
    fn apply<const ORIENTED: bool>(
        &mut self,
        merges: &MergeIndex,
        merge: u32,
        step: &MergeStep,
        interrupt: &Interrupt,
    ) -> Result<()> {
        let newer_token = step.a.max(step.b);
        let Some(maker) = newer_token.checked_sub(merges.base_vocab_size) else {
            self.join_cells::<ORIENTED>(merge, step);
            return Ok(());
        };
        let (first, count) = self.anchors_of_merge[maker as usize];
        let newer_regions = first as usize..(first + count) as usize;
        if ORIENTED {
            self.join_at_offset(merges, merge, step, newer_regions)
        } else if step.a == newer_token {
            self.join_with_following(step, newer_regions, interrupt)
        } else {
            self.collect_pairs(step, newer_regions, interrupt)?;
            self.join_pairs(step, interrupt)
        }
    }

    /// Joins single cells, as listed in the beginning.
    fn join_cells<const ORIENTED: bool>(&mut self, merge: u32, step: &MergeStep) {
        let MergeStep { a, b, token, .. } = *step;
        let mut cell_pair = std::mem::replace(&mut self.first_cell_pair[merge as usize], END);
        let mut n = self.num_anchors;
        while cell_pair != END {
            let (x, y) = cell_pair_positions(cell_pair, self.stride);
            cell_pair = self.next_cell_pair[cell_pair as usize];
            // Only single cells have an id of the codebook, so equal tokens mean that neither was merged.
            let token_at = |p: usize| if ORIENTED { self.tokens[p] } else { unpack(self.cells[p]).0 };
            let is_unmerged = (token_at(x) == a) & (token_at(y) == b);
            let (at_x, at_y) = (x as u32, y as u32);
            if is_unmerged && !step.skips(at_x, at_y) {
                if ORIENTED {
                    (self.tokens[x], self.tokens[y]) = (token, NO_TOKEN);
                } else {
                    (self.cells[x], self.cells[y]) = (pack(token, at_x), pack(token, at_x));
                    (self.next_in_ring[x], self.next_in_ring[y]) = (at_y, at_x);
                    if !self.leaves.is_empty() {
                        self.leaves[y] = 1;
                    }
                }
                self.anchors[n] = at_x;
                n += 1;
            }
        }
        self.num_anchors = n;
    }

    /// Oriented mode: the other region is at the merge's offset, or there is none.
    fn join_at_offset(
        &mut self,
        merges: &MergeIndex,
        merge: u32,
        step: &MergeStep,
        newer_regions: Range<usize>,
    ) -> Result<()> {
        let MergeStep { a, b, token, .. } = *step;
        let offset = merges.entry(merge).offset;
        // Nothing to do in grids that are too small, or if the two shapes are not adjacent.
        let too_far = offset.dy as usize >= self.height || offset.dx.unsigned_abs() as usize >= self.width;
        if too_far || !merges.touches(merge, self.height * self.width)? {
            return Ok(());
        }
        let distance = (offset.dy as usize * self.stride).wrapping_add_signed(offset.dx as isize);
        let mut n = self.num_anchors;
        for i in newer_regions {
            let anchor = self.anchors[i] as usize;
            let (x, y) =
                if a >= b { (anchor, anchor + distance) } else { (anchor.wrapping_sub(distance), anchor) };
            let has_token = |position: usize, token| self.tokens.get(position) == Some(&token);
            if has_token(x, a) & has_token(y, b) && !step.skips(x as u32, y as u32) {
                self.tokens[x] = token;
                self.tokens[y] = NO_TOKEN;
                self.anchors[n] = x as u32;
                n += 1;
            }
        }
        self.num_anchors = n;
        Ok(())
    }

    /// Pair mode, a newer than b: joins each region of a with the first region of b that follows and is beside it.
    fn join_with_following(
        &mut self,
        step: &MergeStep,
        newer_regions: Range<usize>,
        interrupt: &Interrupt,
    ) -> Result<()> {
        let stride = self.stride as u32;
        for (number, i) in newer_regions.enumerate() {
            if number % CHECK_INTERVAL == 0 {
                interrupt.check()?;
            }
            let x = self.anchors[i];
            if self.cells[x as usize] != pack(step.a, x) {
                continue;
            }
            // One subtraction tells token and anchor of a neighbour: from `min_match`, a region of b anchored after x is
            // as far as its anchor from x + 1, and any other cell is `MAX_DISTANCE` or farther.
            let min_match = pack(step.b, x + 1);
            let mut distance = u64::MAX;
            let mut p = x;
            for _ in 0..step.size_a {
                for q in [p - stride, p - 1, p + 1, p + stride] {
                    let to_q = self.cells[q as usize].wrapping_sub(min_match);
                    let is_dropped =
                        step.dropout.is_some() && to_q < MAX_DISTANCE && step.skips(x, x + 1 + to_q as u32);
                    distance = distance.min(if is_dropped { u64::MAX } else { to_q });
                }
                p = self.next_in_ring[p as usize];
            }
            if distance < MAX_DISTANCE {
                self.join_regions(step, x, x + 1 + distance as u32);
            }
        }
        Ok(())
    }

    /// Pair mode, b newer than a: collects the pairs at all regions of b, in raster order. Some may be there twice.
    fn collect_pairs(
        &mut self,
        step: &MergeStep,
        newer_regions: Range<usize>,
        interrupt: &Interrupt,
    ) -> Result<()> {
        let stride = self.stride as u32;
        let mut n = 0;
        for (number, &y) in self.anchors[newer_regions].iter().enumerate() {
            if number % CHECK_INTERVAL == 0 {
                interrupt.check()?;
            }
            if self.cells[y as usize] != pack(step.b, y) {
                continue;
            }
            ensure_len(&mut self.pairs, n + 4 * step.size_b as usize + 1)?;
            let mut p = y;
            for _ in 0..step.size_b {
                for q in [p - stride, p - 1, p + 1, p + stride] {
                    // Branchless: every neighbour is written, and counted if it is a region of a that comes before y.
                    let (token, x) = unpack(self.cells[q as usize]);
                    self.pairs[n] = pack(x, y);
                    n += usize::from(token == step.a) & usize::from(x < y);
                }
                p = self.next_in_ring[p as usize];
            }
        }
        let pairs = &mut self.pairs[..n];
        if !pairs.is_sorted() {
            pairs.sort_unstable();
        }
        self.num_pairs = n;
        Ok(())
    }

    /// Joins the collected pairs, in order, unless one of the two has been joined already.
    fn join_pairs(&mut self, step: &MergeStep, interrupt: &Interrupt) -> Result<()> {
        for i in 0..self.num_pairs {
            if i % CHECK_INTERVAL == 0 {
                interrupt.check()?;
            }
            let (x, y) = unpack(self.pairs[i]);
            let is_unmerged =
                (self.cells[x as usize] == pack(step.a, x)) & (self.cells[y as usize] == pack(step.b, y));
            if is_unmerged && !step.skips(x, y) {
                self.join_regions(step, x, y);
            }
        }
        Ok(())
    }

    /// Pair mode: makes two regions one.
    #[inline]
    fn join_regions(&mut self, step: &MergeStep, x: u32, y: u32) {
        let MergeStep { token, size_a, size_b, .. } = *step;
        // The entry of a single cell in the ring list is not filled in.
        let next_in_ring = self.next_in_ring.as_mut_slice();
        let next = |p: u32, size: u32| if size == 1 { p } else { next_in_ring[p as usize] };
        let (after_x, after_y) = (next(x, size_a), next(y, size_b));
        // The leaves of b come after those of a.
        if !self.leaves.is_empty() {
            let mut p = y;
            for _ in 0..size_b {
                self.leaves[p as usize] += size_a;
                p = if size_b == 1 { p } else { next_in_ring[p as usize] };
            }
        }
        // Two rings become one when one link of each is exchanged.
        next_in_ring[x as usize] = after_y;
        next_in_ring[y as usize] = after_x;
        let mut p = x;
        for _ in 0..size_a + size_b {
            self.cells[p as usize] = pack(token, x);
            p = next_in_ring[p as usize];
        }
        self.anchors[self.num_anchors] = x;
        self.num_anchors += 1;
    }
}
