//! A shard: some of the grids, with lists of where the indexed pairs occur in them.

use std::ops::Range;

use super::canvas::{Canvas, Neighbours, Region, Word};
use super::count::{Counted, Places, Sketch, count, pack, unpack};
use crate::encode::Encoding;
use crate::grid::Offset;
use crate::interrupt::Interrupt;
use crate::statistics::{key, tokens};

/// Occurrences that are fetched at once.
const BLOCK: usize = 16;

/// Most flat offsets that are counted in a table.
const MAX_FLAT: u64 = 1 << 16;

/// A pair, and how many cells its regions have together, at most.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pair {
    /// Its index.
    pub index: u32,
    pub a: u32,
    pub b: u32,
    pub size: u64,
}

/// One rule to apply.
#[derive(Debug, Clone, Copy)]
pub(super) struct Merge {
    pub pair: Pair,
    pub offset: Option<Offset>,
    /// The new token.
    pub token: u32,
}

/// What a rule (a, b) changes about the pairs with a token t.
#[derive(Debug, Clone, Copy, Default)]
struct Tally {
    /// How many of (a, t), (t, a), (b, t), (t, b) are gone. If `a` is `b`, the first two alone count.
    gone: [u32; 4],
    /// How many pairs of the new token and t there are: (new, t), (t, new).
    new: [u32; 2],
}

/// What a rule changes about all pairs.
#[derive(Debug)]
struct Changes {
    /// Per token; all 0 between rules.
    tally: Vec<Tally>,
    /// The adjacencies of the new token: which pair, and the other region's anchor and the new one's. The first `len`
    /// count.
    adjacencies: Vec<(NewPair, u32, u32)>,
    len: usize,
}

impl Changes {
    /// Makes room for so many more adjacencies.
    fn reserve(&mut self, room: usize) {
        if self.adjacencies.len() < self.len + room {
            self.adjacencies.resize(2 * (self.len + room), (0, 0, 0));
        }
    }

    /// Notes that the pair of `side` with `other` is gone, if it is `lost`, and that the region `z` of that token now
    /// is beside the region of the new token at `x`, if that is `fresh`. All is written in any case.
    #[inline(always)]
    fn note(&mut self, (z, other): Region, side: usize, lost: bool, (x, token): Region, fresh: bool) {
        let tally = &mut self.tally[other as usize];
        tally.gone[side] += u32::from(lost);
        let before = usize::from(z < x) & usize::from(other != token);
        tally.new[before] += u32::from(fresh);
        self.adjacencies[self.len] = (2 * other + before as u32, z, x);
        self.len += usize::from(fresh);
    }
}

/// Some of the grids.
#[derive(Debug)]
pub(super) struct Shard<W> {
    canvas: Canvas<W>,
    /// Tokens below this are of the codebook: their regions are single cells.
    base_vocab_size: u32,
    /// Per indexed pair, where it occurs, and some places where it no longer does. A place is out of date when an anchor
    /// has another token: a region's token never comes back.
    places: Vec<Places>,
    counted: Vec<Counted>,
    changes: Changes,
    /// After a rule, the pairs with the new token, each once, and their counts.
    added: Vec<(NewPair, u32)>,
    /// How often a pair occurs at which flat offset (difference of positions); all 0 between calls.
    flat: Vec<u32>,
    of_x: Neighbours,
    of_y: Neighbours,
}

/// A pair of the new token with token t: (new, t) is 2t and (t, new) is 2t + 1.
pub(super) type NewPair = u32;

/// The key of such a pair.
pub(super) fn new_key(new: u32, pair: NewPair) -> u64 {
    if pair & 1 == 0 { key(new, pair >> 1) } else { key(pair >> 1, new) }
}

impl<W: Word> Shard<W> {
    /// No grids, for tokens below `tokens`, those of the codebook being below `base_vocab_size`.
    pub fn new(base_vocab_size: u32, tokens: u32) -> Self {
        Self {
            canvas: Canvas::new(tokens),
            base_vocab_size,
            places: Vec::new(),
            counted: Vec::new(),
            // One more, for the border.
            changes: Changes {
                tally: vec![Tally::default(); tokens as usize + 1],
                adjacencies: Vec::new(),
                len: 0,
            },
            added: Vec::new(),
            flat: Vec::new(),
            of_x: Neighbours::default(),
            of_y: Neighbours::default(),
        }
    }

    /// Makes room for exactly this many cells.
    pub fn reserve(&mut self, cells: u64) {
        self.canvas.reserve(cells as usize);
    }

    /// Adds an empty grid and returns where it is.
    pub fn push(&mut self, height: u32, width: u32) -> u32 {
        self.canvas.push(height, width)
    }

    /// Fills a grid of this width, every cell a region of its own.
    pub fn set(&mut self, position: u32, width: u32, ids: &[u32]) {
        for (start, row) in (position..).step_by(width as usize + 1).zip(ids.chunks_exact(width as usize)) {
            self.canvas.set_row(start, row);
        }
    }

    /// Fills a grid of this width with the regions that it was encoded to.
    pub fn set_encoded(&mut self, position: u32, width: u32, encoding: &Encoding) {
        let Some(regions) = &encoding.regions else { return };
        let mut anchors = vec![None; encoding.ids.len()];
        let rows = (position..).step_by(width as usize + 1).zip(regions.tokens.chunks_exact(width as usize));
        for (p, &index) in rows.flat_map(|(start, row)| (start..).zip(row)) {
            let token = encoding.ids[index as usize];
            match anchors[index as usize] {
                None => {
                    self.canvas.set_row(p, &[token]);
                    anchors[index as usize] = Some(p);
                }
                Some(anchor) => self.canvas.join(anchor, p, token),
            }
        }
    }

    /// Counts all pairs by a hash of 2^`bits` values: upper bounds of their counts.
    pub fn sketch(&self, bits: u32, interrupt: &Interrupt) -> Sketch {
        Sketch::new(&self.canvas, bits, interrupt)
    }

    /// Counts exactly those pairs whose bound reaches the threshold, and notes where they occur. There are `shards`.
    pub fn count(
        &mut self,
        shards: usize,
        sketch: &Sketch,
        threshold: u64,
        interrupt: &Interrupt,
    ) -> Vec<(u64, u64)> {
        self.places = Vec::new();
        self.counted = count(&self.canvas, self.base_vocab_size, sketch, threshold, shards, interrupt);
        self.counted.iter().map(|pair| (pair.key, pair.count)).collect()
    }

    /// Makes what was counted the new lists, given the pairs that were taken up, in order, their index being their place.
    pub fn index_counted(&mut self, keys: &[u64]) {
        self.places.resize_with(keys.len(), Places::default);
        for Counted { key, places, .. } in self.counted.drain(..) {
            if let Ok(pair) = keys.binary_search(&key) {
                self.places[pair] = places;
            }
        }
    }

    /// Gives up a pair's list.
    pub fn forget(&mut self, pair: u32) {
        self.take(pair);
    }

    /// Where a pair occurs, taken out.
    fn take(&mut self, pair: u32) -> Places {
        self.places.get_mut(pair as usize).map(std::mem::take).unwrap_or_default()
    }

    fn put(&mut self, pair: u32, places: Places) {
        if let Some(place) = self.places.get_mut(pair as usize) {
            *place = places;
        }
    }

    /// Counts a pair's offsets, in no order and not all in one place, and forgets where it no longer occurs.
    pub fn histogram(&mut self, pair: Pair) -> Vec<(Offset, u64)> {
        let mut offsets = Vec::new();
        let mut places = self.take(pair.index);
        let Self { canvas, flat, .. } = self;
        match &mut places {
            Places::Cells(list) => {
                let parts = canvas.by_stride(list, |&x| x);
                retain(list, parts, |part, stride| cell_offsets(canvas, pair, stride, part, &mut offsets));
            }
            Places::Regions(list) => {
                if !list.is_sorted() {
                    list.sort_unstable();
                }
                let parts = canvas.by_stride(list, |&place| unpack(place).0);
                retain(list, parts, |part, stride| {
                    let kept = canvas.retain(part, pair.a, pair.b);
                    region_offsets(canvas, pair, stride, &part[..kept], flat, &mut offsets);
                    kept
                });
            }
        }
        self.put(pair.index, places);
        offsets
    }

    /// Applies a rule to the shard's grids, notes what it did to the counts, and returns how many regions it merged.
    pub fn apply(&mut self, merge: Merge, interrupt: &Interrupt) -> u64 {
        let Merge { pair: Pair { index, a, b, .. }, token, .. } = merge;
        let mut places = self.take(index);
        let Self { canvas, changes, of_x, of_y, .. } = self;
        changes.len = 0;
        let mut merges = 0;
        match &mut places {
            Places::Cells(list) => {
                let mut left = Vec::new();
                for (stride, range) in canvas.by_stride(list, |&x| x) {
                    for block in list[range].chunks_mut(BLOCK) {
                        if interrupt.is_set() {
                            return merges;
                        }
                        merges += join_cells(canvas, merge, stride, block, changes, &mut left);
                    }
                }
                *list = left;
            }
            Places::Regions(list) => {
                // In raster order since the pair's histogram was asked for.
                let mut left = Vec::new();
                for (stride, range) in canvas.by_stride(list, |&place| unpack(place).0) {
                    for block in list[range].chunks_mut(BLOCK) {
                        if interrupt.is_set() {
                            return merges;
                        }
                        merges += join_regions(canvas, merge, stride, block, [of_x, of_y], changes, &mut left);
                    }
                }
                *list = left;
            }
        }
        self.put(index, places);
        self.sum_changes(a, b, token);
        merges
    }

    /// Lists the pairs with the new token.
    fn sum_changes(&mut self, a: u32, b: u32, token: u32) {
        let Changes { tally, adjacencies, len } = &mut self.changes;
        // Pairs that came with one merge and went with a later one.
        let [a_new, new_a, b_new, new_b] = tally[token as usize].gone;
        tally[a as usize].new[1] -= a_new;
        tally[a as usize].new[0] -= new_a;
        tally[b as usize].new[1] -= b_new;
        tally[b as usize].new[0] -= new_b;
        self.added.clear();
        for &(pair, ..) in &adjacencies[..*len] {
            let count = std::mem::take(&mut tally[pair as usize / 2].new[pair as usize % 2]);
            if count > 0 {
                self.added.push((pair, count));
            }
        }
    }

    /// How many adjacencies of this pair the rule (a, b) took away.
    pub fn removed(&self, key: u64, a: u32, b: u32) -> u64 {
        let (first, second) = tokens(key);
        let gone = |token: u32, side: usize| u64::from(self.changes.tally[token as usize].gone[side]);
        let mut sum = 0;
        for (side, token) in [(0, a), (2, b)].into_iter().take(if a == b { 1 } else { 2 }) {
            sum += if first == token { gone(second, side) } else { 0 };
            sum += if second == token { gone(first, side + 1) } else { 0 };
        }
        sum
    }

    /// Pairs that came with the last rule, each once, and their counts.
    pub fn added(&self) -> &[(NewPair, u32)] {
        &self.added
    }

    /// Ends a rule: starts the lists of those new pairs that were taken up, given their indices.
    pub fn index_added(&mut self, merge: Merge, pairs: &[(NewPair, u32)]) {
        let Self { changes: Changes { tally, adjacencies, len }, added, places, .. } = self;
        for token in [merge.pair.a, merge.pair.b, merge.token] {
            tally[token as usize].gone = [0; 4];
        }
        for &(new, _) in &*added {
            tally[new as usize / 2].gone = [0; 4];
        }
        let Some(&(_, last)) = pairs.last() else { return };
        if places.len() <= last as usize {
            places.resize_with(last as usize + 1, Places::default);
        }
        for &(new, pair) in pairs {
            tally[new as usize / 2].new[new as usize % 2] = pair + 1;
        }
        for &mut (new, count) in added {
            if let Some(pair) = tally[new as usize / 2].new[new as usize % 2].checked_sub(1) {
                places[pair as usize] = Places::Regions(Vec::with_capacity(count as usize));
            }
        }
        for &(new, z, x) in &adjacencies[..*len] {
            if let Some(pair) = tally[new as usize / 2].new[new as usize % 2].checked_sub(1)
                && let Places::Regions(places) = &mut places[pair as usize]
            {
                places.push(pack(x.min(z), x.max(z)));
            }
        }
        for &(new, _) in pairs {
            tally[new as usize / 2].new[new as usize % 2] = 0;
        }
    }
}

/// Joins single cells: `a` with `b` right of it or below it.
fn join_cells<W: Word>(
    canvas: &mut Canvas<W>,
    merge: Merge,
    stride: u32,
    block: &mut [u32],
    changes: &mut Changes,
    left: &mut Vec<u32>,
) -> u64 {
    let Merge { pair: Pair { a, b, .. }, offset, token } = merge;
    let wanted = |dy: i32, dx: i32| offset.is_none_or(|offset| offset == Offset { dy, dx });
    let (right, below) = (wanted(0, 1), wanted(1, 0));
    let side_of_b = if a == b { 0 } else { 2 };
    let valid = canvas.fetch_cells(block, a, b, stride);
    let mut merges = 0;
    changes.reserve(7 * valid);
    for &x in &block[..valid] {
        // One before it may have taken it.
        if !canvas.is(x, a) {
            continue;
        }
        let (is_right, is_below) = (canvas.is(x + 1, b), canvas.is(x + stride, b));
        if !(is_right & right | is_below & below) {
            if is_right | is_below {
                left.push(x);
            }
            continue;
        }
        let y = if is_right & right { x + 1 } else { x + stride };
        let [u, v, w, p, q, r] = canvas.around(x, y, stride);
        canvas.merge_cells(x, y, token);
        merges += 1;
        // Each region once among those around x and once among those around y.
        let inside = |region: Region| !canvas.is_border(region.1);
        let around_x = [
            inside(u),
            inside(v) & (v.0 != u.0),
            inside(w) & (w.0 != u.0) & (w.0 != v.0),
        ];
        let around_y = [
            inside(p),
            inside(q) & (q.0 != p.0),
            inside(r) & (r.0 != p.0) & (r.0 != q.0),
        ];
        let beside_x = |z: u32| (z == u.0) | (z == v.0) | (z == w.0);
        let mut of_x = |region: Region, there| {
            changes.note(region, usize::from(region.0 < x), there, (x, token), there);
        };
        of_x(u, around_x[0]);
        of_x(v, around_x[1]);
        of_x(w, around_x[2]);
        changes.note((y, b), 0, true, (x, token), false);
        let mut of_y = |region: Region, there| {
            let side = side_of_b + usize::from(region.0 < y);
            changes.note(region, side, there, (x, token), there & !beside_x(region.0));
        };
        of_y(p, around_y[0]);
        of_y(q, around_y[1]);
        of_y(r, around_y[2]);
    }
    merges
}

/// Joins regions of any size.
fn join_regions<W: Word>(
    canvas: &mut Canvas<W>,
    merge: Merge,
    stride: u32,
    block: &mut [u64],
    [of_x, of_y]: [&mut Neighbours; 2],
    changes: &mut Changes,
    left: &mut Vec<u64>,
) -> u64 {
    let Merge { pair: Pair { a, b, .. }, offset, token } = merge;
    let step = offset.map(|offset| (offset.dy as u32).wrapping_mul(stride).wrapping_add(offset.dx as u32));
    let side_of_b = if a == b { 0 } else { 2 };
    let valid = canvas.fetch(block, a, b, stride);
    let mut merges = 0;
    for &place in &block[..valid] {
        let (x, y) = unpack(place);
        // One before it may have taken it.
        if !(canvas.is(x, a) & canvas.is(y, b)) {
            continue;
        }
        // Differences of positions are soon compared; two offsets may have the same.
        if step.is_some_and(|step| step != y - x)
            || offset.is_some_and(|offset| canvas.offset(x, y) != offset)
        {
            left.push(place);
            continue;
        }
        canvas.neighbours(x, stride, of_x);
        canvas.neighbours(y, stride, of_y);
        canvas.merge(x, y, token);
        merges += 1;
        changes.reserve(of_x.len() + of_y.len() + 1);
        for (z, other) in of_x.iter() {
            changes.note((z, other), usize::from(z < x), true, (x, token), z != y);
        }
        for (z, other) in of_y.iter() {
            let side = side_of_b + usize::from(z < y);
            changes.note((z, other), side, z != x, (x, token), (z != x) & !of_x.contains(z));
        }
    }
    merges
}

/// Moves to the front what is kept of each part of a list, as `keep` has moved it to the front of the part.
fn retain<T: Copy>(
    list: &mut Vec<T>,
    parts: Vec<(u32, Range<usize>)>,
    mut keep: impl FnMut(&mut [T], u32) -> usize,
) {
    let mut end = 0;
    for (stride, range) in parts {
        let kept = keep(&mut list[range.clone()], stride);
        list.copy_within(range.start..range.start + kept, end);
        end += kept;
    }
    list.truncate(end);
}

/// Counts the offsets of a pair of single cells and moves to the front where it occurs.
fn cell_offsets<W: Word>(
    canvas: &Canvas<W>,
    pair: Pair,
    stride: u32,
    list: &mut [u32],
    offsets: &mut Vec<(Offset, u64)>,
) -> usize {
    let Pair { a, b, .. } = pair;
    let (mut rights, mut belows, mut kept) = (0, 0, 0);
    for i in 0..list.len() {
        let x = list[i];
        let here = canvas.is(x, a);
        let (right, below) = (here & canvas.is(x + 1, b), here & canvas.is(x + stride, b));
        rights += u64::from(right);
        belows += u64::from(below);
        list[kept] = x;
        kept += usize::from(right | below);
    }
    let counts = [(Offset { dy: 0, dx: 1 }, rights), (Offset { dy: 1, dx: 0 }, belows)];
    offsets.extend(counts.into_iter().filter(|&(_, count)| count > 0));
    kept
}

/// Counts the offsets of pairs of regions.
fn region_offsets<W: Word>(
    canvas: &Canvas<W>,
    pair: Pair,
    stride: u32,
    list: &[u64],
    flat: &mut Vec<u32>,
    offsets: &mut Vec<(Offset, u64)>,
) {
    // If rows are long enough, a difference of positions tells the offset.
    let most = pair.size * u64::from(stride);
    if 2 * pair.size > u64::from(stride) || most > MAX_FLAT {
        for &place in list {
            let (x, y) = unpack(place);
            let offset = canvas.offset(x, y);
            match offsets.iter_mut().take(16).find(|(other, _)| *other == offset) {
                Some((_, count)) => *count += 1,
                None => offsets.push((offset, 1)),
            }
        }
        return;
    }
    if flat.len() < most as usize {
        flat.resize(most as usize, 0);
    }
    let step = |place| {
        let (x, y) = unpack(place);
        (y - x) as usize
    };
    for &place in list {
        flat[step(place)] += 1;
    }
    for &place in list {
        let step = step(place) as u32;
        let count = std::mem::take(&mut flat[step as usize]);
        if count > 0 {
            let dy = (step + stride / 2) / stride;
            let dx = step as i32 - (dy * stride) as i32;
            offsets.push((Offset { dy: dy as i32, dx }, count.into()));
        }
    }
}
