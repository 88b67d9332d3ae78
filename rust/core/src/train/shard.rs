//! A shard: some of the grids, with lists of where the indexed pairs occur in them.

use std::sync::Arc;

use super::count_regions::{Count, Counted, Sketch, count};
use super::occurrences::{Found, Lists, Places, pack, unpack};
use super::regions::{Canvas, Neighbour, Neighbours, Region, Word, around, is, region};
use crate::encode::Encoding;
use crate::grid::Offset;
use crate::interrupt::Interrupt;
use crate::statistics::key;

/// Occurrences that are fetched at once.
const BLOCK: usize = 16;

/// Most flat offsets that are counted in a table.
const MAX_FLAT: u64 = 1 << 16;

/// A pair, and how many cells its regions have, at most.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pair {
    /// Its index.
    pub index: u32,
    pub a: u32,
    pub b: u32,
    /// Of a region of `a` and of one of `b`.
    pub sizes: [u64; 2],
}

impl Pair {
    /// How many cells its regions have together, at most.
    pub fn size(self) -> u64 {
        self.sizes[0].saturating_add(self.sizes[1])
    }
}

/// One rule to apply.
#[derive(Debug, Clone, Copy)]
pub(super) struct Merge {
    pub pair: Pair,
    pub offset: Option<Offset>,
    /// The new token.
    pub token: u32,
}

/// Places after which tallies are added up: a single cell has four neighbours, so a merge adds at most 9 to half a number.
const MOST_TALLIED: usize = 7168;

/// How many of the pairs (a, t), (t, a), (b, t), (t, b) with a token t a rule (a, b) takes away; if `a` is `b`, the first
/// two alone count. Where `a` or `b` of such a pair is of the codebook, all of them are in the low half of a number, and
/// those whose second region lies below the first rather than right of it are in the high half, which means something for
/// pairs of single cells.
type Tally = [u32; 4];

/// What a pair of single cells adds to a [`Tally`] besides 1, if the second lies below the first.
const BELOW: u32 = 1 << 16;

/// A pair of the new token and another, which comes `before` it or after it; below twice the number of tokens.
pub(super) type NewPair = u32;

/// What follows from a rule, once the changes of all shards are added up.
#[derive(Debug)]
pub(super) struct Outcome {
    /// The pairs of the new token that were taken up, and their indices.
    pub taken_up: Vec<(NewPair, u32)>,
    /// Pairs that are no longer indexed.
    pub dropped: Vec<u32>,
    /// Whether to tidy up the lists, which all shards do at once if one has to, lest each be waited for alone.
    pub tidy: bool,
}

pub(super) fn new_pair(token: u32, before: bool) -> NewPair {
    token * 2 + u32::from(before)
}

/// The key of such a pair.
pub(super) fn new_key(new: u32, pair: NewPair) -> u64 {
    let token = pair / 2;
    if pair == new_pair(token, false) { key(new, token) } else { key(token, new) }
}

/// An adjacency of the new token: which pair, the other region's anchor, the new one's.
type Adjacency = (NewPair, u32, u32);

/// What a rule changes about all pairs.
#[derive(Debug)]
struct Changes {
    /// Per token; all 0 between rules.
    tallies: Vec<Tally>,
    /// Per pair with the new token, how often it was found; all 0 when these are listed.
    numbers: Vec<u32>,
    /// The first `num_added` are the pairs with the new token, each once.
    added: Vec<NewPair>,
    num_added: usize,
    /// The first `len` count.
    adjacencies: Vec<Adjacency>,
    len: usize,
}

impl Changes {
    /// None, for so many tokens, border among them.
    fn new(tokens: usize) -> Self {
        Self {
            tallies: vec![Tally::default(); tokens],
            numbers: vec![0; 2 * tokens],
            // One more, which is written but does not count.
            added: vec![0; 2 * tokens + 1],
            num_added: 0,
            adjacencies: Vec::new(),
            len: 0,
        }
    }

    /// Takes notes, at most so many that count.
    fn notes(&mut self, most: usize, token: u32) -> Notes<'_> {
        let end = self.len + most + 1;
        if self.adjacencies.len() < end {
            self.adjacencies.resize(2 * end, (0, 0, 0));
        }
        let Self { tallies, adjacencies, len, .. } = self;
        Notes { token, tallies, adjacencies, len: *len }
    }

    /// Counts the pairs that were noted after so many others.
    fn count_from(&mut self, start: usize) {
        let Self { numbers, added, num_added, adjacencies, len, .. } = self;
        for &(new, ..) in &adjacencies[start..*len] {
            let count = &mut numbers[new as usize];
            added[*num_added] = new;
            *num_added += usize::from(*count == 0);
            *count += 1;
        }
    }

    /// Adds up what was taken away since the last call of [`Changes::clear_gone`]: the pairs with these tokens in these
    /// places of a tally.
    fn settle(
        &self,
        Pair { a, b, .. }: Pair,
        base_vocab_size: u32,
        sides: &[(u32, usize)],
        removed: &mut [Count],
    ) {
        for (removed, &(token, side)) in removed.iter_mut().zip(sides) {
            let gone = self.tallies[token as usize][side];
            let own = if side < 2 { a } else { b };
            *removed += if own < base_vocab_size {
                Count { all: (gone % BELOW).into(), below: (gone / BELOW).into() }
            } else {
                Count { all: gone.into(), below: 0 }
            };
        }
    }

    /// Forgets what was taken away.
    fn clear_gone(&mut self, Merge { pair: Pair { a, b, .. }, token, .. }: Merge) {
        let others = self.added[..self.num_added].iter().map(|new| new / 2);
        for token in others.chain([a, b, token]) {
            self.tallies[token as usize] = Tally::default();
        }
    }
}

/// [`Changes`] while they are noted, in registers.
struct Notes<'a> {
    /// The new token.
    token: u32,
    tallies: &'a mut [Tally],
    adjacencies: &'a mut [Adjacency],
    len: usize,
}

impl Notes<'_> {
    /// Notes that so many pairs of sides with a region's token are gone, and that this region, which is anchored `before`
    /// `x` or after it, now is beside the region of the new token at `x`, if that is `fresh`. All is written in any case,
    /// since a branch would be guessed wrong all the time.
    #[inline]
    #[expect(clippy::needless_bitwise_bool, reason = "a branch would be guessed wrong half the time")]
    fn add<const N: usize>(
        &mut self,
        (z, other): Region,
        gone: [(usize, u32); N],
        x: u32,
        before: bool,
        fresh: bool,
    ) {
        let before = before & (other != self.token);
        let tally = &mut self.tallies[other as usize];
        for (side, tallied) in gone {
            let gone = &mut tally[side % 4];
            *gone = gone.wrapping_add(tallied);
        }
        self.adjacencies[self.len] = (new_pair(other, before), z, x);
        self.len += usize::from(fresh);
    }
}

/// Some of the grids.
#[derive(Debug)]
pub(super) struct Shard<W> {
    canvas: Canvas<W>,
    /// Regions that grids were set to.
    tokens: u64,
    /// Per indexed pair, where it occurs, and some places where it no longer does. A place is out of date when an anchor
    /// has another token: a region's token never comes back.
    lists: Lists,
    sketch: Sketch,
    /// The pairs counted last: how often and where they occur, by key.
    counts: Vec<(u64, Count)>,
    counted: Vec<Found>,
    changes: Changes,
    /// How many regions the last rule merged.
    merged: u64,
    /// Whether it is time to tidy up the lists.
    untidy: bool,
    /// What it took away.
    removed: Vec<Count>,
    /// How often the pairs counted last, which are numbered, occur at which offset.
    offsets: Vec<((usize, Offset), u64)>,
    /// The pairs with the new token that may be frequent.
    frequent: Vec<NewPair>,
    /// The last rule, and what follows from it for the lists, if that is still to be done.
    outcome: Option<(Merge, Arc<Outcome>)>,
    /// How often a pair occurs at which flat offset (difference of positions); all 0 between calls.
    flat: Vec<u32>,
    neighbours: Neighbours,
}

impl<W: Word> Shard<W> {
    /// No grids, for tokens below `tokens`, those of the codebook being below `base_vocab_size`.
    pub fn new(base_vocab_size: u32, tokens: u32) -> Self {
        Self {
            canvas: Canvas::new(base_vocab_size, tokens),
            tokens: 0,
            lists: Lists::default(),
            sketch: Sketch::default(),
            counts: Vec::new(),
            counted: Vec::new(),
            // One more, for the border.
            changes: Changes::new(tokens as usize + 1),
            merged: 0,
            untidy: false,
            removed: Vec::new(),
            offsets: Vec::new(),
            frequent: Vec::new(),
            outcome: None,
            flat: Vec::new(),
            neighbours: Neighbours::default(),
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
        self.tokens += ids.len() as u64;
        for (start, row) in (position..).step_by(width as usize + 1).zip(ids.chunks_exact(width as usize)) {
            self.canvas.set_row(start, row);
        }
    }

    /// Fills a grid of this width with the regions that it was encoded to.
    pub fn set_encoded(&mut self, position: u32, width: u32, encoding: &Encoding) {
        let Some(regions) = &encoding.regions else { return };
        self.tokens += encoding.ids.len() as u64;
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

    /// How many regions its grids had when they were set.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Its grids.
    pub fn canvas(&self) -> &Canvas<W> {
        &self.canvas
    }

    /// Takes the places of pairs that were counted elsewhere, and memory for lists to come.
    pub fn set_counted(&mut self, counted: Vec<Found>, memory: Vec<u64>) {
        (self.counted, self.lists) = (counted, Lists::new(memory));
    }

    /// Counts all pairs by a hash of 2^`bits` values: upper bounds of their counts.
    pub fn count_roughly(&mut self, bits: u32, interrupt: &Interrupt) {
        self.sketch = Sketch::new(&self.canvas, bits, interrupt);
    }

    /// What the last such count said.
    pub fn sketch(&self) -> &Sketch {
        &self.sketch
    }

    /// Counts exactly those pairs whose hash has a bit in `reaching`, and notes where they occur.
    pub fn count(&mut self, reaching: &[u64], interrupt: &Interrupt) {
        self.update_lists();
        self.lists = Lists::default();
        let sketch = std::mem::take(&mut self.sketch);
        let counted = count(&mut self.canvas, &sketch, reaching, interrupt);
        self.counts = counted.iter().map(|pair| (pair.key, pair.count)).collect();
        let found = |Counted { key, places, .. }| Found { pairs: vec![(key, places.len())], places };
        self.counted = counted.into_iter().map(found).collect();
    }

    /// What such a count found, taken out.
    pub fn take_counts(&mut self) -> Vec<(u64, Count)> {
        std::mem::take(&mut self.counts)
    }

    /// Makes what was counted the new lists, given the pairs that were taken up, in order, their index being their place.
    pub fn index_counted(&mut self, keys: &[u64]) {
        for found in std::mem::take(&mut self.counted) {
            self.lists.extend(keys, found);
        }
    }

    /// Counts the offsets of numbered pairs of regions, in no order and not all in one place, and forgets where they no
    /// longer occur.
    pub fn count_offsets(&mut self, pairs: &[(usize, Pair)], interrupt: &Interrupt) {
        self.update_lists();
        let Self { canvas, lists, offsets, flat, .. } = self;
        offsets.clear();
        let nexts = pairs.iter().skip(1).map(Some).chain([None]);
        for (&(number, pair), next) in pairs.iter().zip(nexts) {
            if interrupt.is_set() {
                return;
            }
            if let Some((_, next)) = next
                && let Places::Regions(list) = lists.get(next.index)
            {
                canvas.fetch_anchors(list);
            }
            let Places::Regions(list) = lists.get(pair.index) else { continue };
            let (mut start, mut end) = (0, 0);
            while let Some((stride, len)) = canvas.first_of_stride(&list[start..], |&place| unpack(place).0) {
                let part = &mut list[start..start + len];
                let kept = canvas.retain(part, pair.a, pair.b);
                region_offsets(canvas, (number, pair), stride, &part[..kept], flat, offsets);
                list.copy_within(start..start + kept, end);
                end += kept;
                start += len;
            }
            lists.truncate(pair.index, end);
        }
    }

    /// The last such counts.
    pub fn offsets(&self) -> &[((usize, Offset), u64)] {
        &self.offsets
    }

    /// Applies a rule to the shard's grids, and notes what it did to the counts, how many regions it merged, and how many
    /// pairs it took away with these tokens in these places of a tally. New pairs with fewer occurrences than `least` are
    /// not frequent.
    pub fn apply(&mut self, merge: Merge, sides: &[(u32, usize)], least: u64, interrupt: &Interrupt) {
        let Merge { pair: Pair { index, .. }, .. } = merge;
        self.fetch_first(index);
        self.update_lists();
        let Self { canvas, lists, changes, neighbours, removed, .. } = self;
        (changes.len, changes.num_added) = (0, 0);
        removed.clear();
        removed.resize(sides.len(), Count::default());
        self.merged = 0;
        match lists.get(index) {
            Places::Cells(list) => {
                let mut rest = &*list;
                while let Some((stride, len)) = canvas.first_of_stride(rest, |&x| x) {
                    let (first, others) = rest.split_at(len);
                    rest = others;
                    for part in first.chunks(MOST_TALLIED) {
                        changes.clear_gone(merge);
                        for (block, next) in with_next(part) {
                            if interrupt.is_set() {
                                return;
                            }
                            canvas.fetch_cells(next, stride);
                            self.merged += join_cells(canvas, merge, stride, block, changes);
                        }
                        changes.settle(merge.pair, canvas.base_vocab_size, sides, removed);
                    }
                }
            }
            Places::Regions(list) => {
                sort_nearly_sorted(list);
                let Pair { a, b, .. } = merge.pair;
                let cell = a.min(b) < canvas.base_vocab_size;
                let join = if cell { join_regions::<true, W> } else { join_regions::<false, W> };
                let mut rest = &*list;
                while let Some((stride, len)) = canvas.first_of_stride(rest, |&place| unpack(place).0) {
                    let (first, others) = rest.split_at(len);
                    rest = others;
                    for part in first.chunks(MOST_TALLIED) {
                        changes.clear_gone(merge);
                        for (block, next) in with_next(part) {
                            if interrupt.is_set() {
                                return;
                            }
                            canvas.fetch(next, stride);
                            self.merged += join(canvas, merge, stride, block, neighbours, changes);
                        }
                        changes.settle(merge.pair, canvas.base_vocab_size, sides, removed);
                    }
                }
            }
        }
        self.untidy = lists.are_untidy();
        let is_frequent = |&&new: &&NewPair| u64::from(changes.numbers[new as usize]) >= least;
        self.frequent.clear();
        self.frequent.extend(changes.added[..changes.num_added].iter().filter(is_frequent));
    }

    /// Begins to fetch what a pair's first merges need.
    fn fetch_first(&mut self, pair: u32) {
        let Self { canvas, lists, .. } = self;
        match lists.get(pair) {
            Places::Cells(list) => {
                for &x in list.iter().take(BLOCK) {
                    canvas.fetch_cells(&[x], canvas.stride(x));
                }
            }
            Places::Regions(list) => {
                for &place in list.iter().take(BLOCK) {
                    canvas.fetch(&[place], canvas.stride(unpack(place).0));
                }
            }
        }
    }

    /// How many regions the last rule merged.
    pub fn merged(&self) -> u64 {
        self.merged
    }

    /// Whether it is time to tidy up the lists.
    pub fn is_untidy(&self) -> bool {
        self.untidy
    }

    /// How many pairs the last rule took away, by the number of the token and place it was given.
    pub fn removed(&self, number: usize) -> Count {
        self.removed[number]
    }

    /// Pairs that came with the last rule, each once, those with fewer occurrences than its `least` left out.
    pub fn frequent(&self) -> &[NewPair] {
        &self.frequent
    }

    /// How many pairs of a kind came with it, some of which may be gone already.
    pub fn added(&self, new: NewPair) -> u64 {
        self.changes.numbers[new as usize].into()
    }

    /// Ends a rule. The lists follow when the shard is next worked on, or before by [`Shard::update_lists`], lest threads be
    /// waited for once more.
    pub fn conclude(&mut self, merge: Merge, outcome: Arc<Outcome>) {
        self.outcome = Some((merge, outcome));
    }

    /// Starts the lists of the last rule's new pairs and gives up those of pairs dropped, if that is still to be done.
    pub fn update_lists(&mut self) {
        let Some((merge, outcome)) = self.outcome.take() else { return };
        let Outcome { taken_up, dropped, tidy } = &*outcome;
        for &pair in dropped {
            self.lists.truncate(pair, 0);
        }
        if *tidy {
            self.lists.tidy();
        }
        let Self { changes, lists, .. } = self;
        changes.clear_gone(merge);
        let Changes { numbers, added, num_added, adjacencies, len, .. } = changes;
        let lens: Vec<_> = taken_up.iter().map(|&(new, _)| numbers[new as usize] as usize).collect();
        for &new in &added[..*num_added] {
            numbers[new as usize] = 0;
        }
        let Some(&(_, first)) = taken_up.first() else { return };
        for (number, &(new, _)) in (1..).zip(taken_up) {
            numbers[new as usize] = number;
        }
        // First those of listed pairs are picked, without a branch.
        let adjacencies = &mut adjacencies[..*len];
        let mut kept = 0;
        for i in 0..adjacencies.len() {
            let (new, z, x) = adjacencies[i];
            let number = numbers[new as usize];
            adjacencies[kept] = (number, z, x);
            kept += usize::from(number > 0);
        }
        let mut cursors = Vec::with_capacity(lens.len() + 1);
        cursors.push(0);
        cursors.extend(lens.iter().scan(0, |end, len| Some(std::mem::replace(end, *end + len))));
        lists.add(first, &lens, |places| {
            let cursors = cursors.as_mut_slice();
            for &(number, z, x) in &adjacencies[..kept] {
                let cursor = &mut cursors[number as usize];
                places[*cursor] = pack(x.min(z), x.max(z));
                *cursor += 1;
            }
        });
        for &(new, _) in taken_up {
            numbers[new as usize] = 0;
        }
    }
}

/// The blocks of a list, each with the one after it.
fn with_next<T>(list: &[T]) -> impl Iterator<Item = (&[T], &[T])> {
    let nexts = list.chunks(BLOCK).skip(1).chain([&[][..]]);
    list.chunks(BLOCK).zip(nexts)
}

/// Joins single cells: `a` with `b` right of it or below it.
#[expect(clippy::needless_bitwise_bool, reason = "a branch would be guessed wrong half the time")]
fn join_cells<W: Word>(
    canvas: &mut Canvas<W>,
    merge: Merge,
    stride: u32,
    block: &[u32],
    changes: &mut Changes,
) -> u64 {
    let Merge { pair: Pair { a, b, .. }, offset, token } = merge;
    let wanted = |dy: i32, dx: i32| offset.is_none_or(|offset| offset == Offset { dy, dx });
    let (right, below) = (wanted(0, 1), wanted(1, 0));
    let side_of_b = if a == b { 0 } else { 2 };
    let mut there = [0; BLOCK];
    let there = canvas.side_by_side(block, (a, b), stride, &mut there);
    let (mut merges, mut to_below) = (0, 0);
    let (cells, border) = canvas.cells_to_merge();
    let start = changes.len;
    let mut notes = changes.notes(6 * there.len(), token);
    for &x in there {
        // One before it may have taken one of them.
        let to_right = is(cells, x + 1, b) & right;
        let is_below = is(cells, x + stride, b) & below;
        if !is(cells, x, a) | !(to_right | is_below) {
            continue;
        }
        merges += 1;
        to_below += u32::from(!to_right);
        let distance = if to_right { 1 } else { stride };
        let y = x + distance;
        // What is around x without y, and around y without x.
        let [u, v, w, p, q, r] = around(x, distance, stride).map(|q| region(cells, q));
        cells[x as usize] = W::new(token, 0);
        cells[y as usize] = W::new(token, distance);

        // Each region once among those around x and once among those around y.
        let inside = |region: Region| region.1 != border;
        let (once_u, once_v) = (inside(u), inside(v) & (v.0 != u.0));
        let once_w = inside(w) & (w.0 != u.0) & (w.0 != v.0);
        let (once_p, once_q) = (inside(p), inside(q) & (q.0 != p.0));
        let once_r = inside(r) & (r.0 != p.0) & (r.0 != q.0);
        let not_beside_x = |z: u32| (z != u.0) & (z != v.0) & (z != w.0);
        let side_of_y = |z: u32| side_of_b + usize::from(z < y);
        let across = 1 + u32::from(to_right) * BELOW;
        let if_once = |once: bool, pair: u32| u32::from(once).wrapping_neg() & pair;
        // What is above or left of x is anchored before it.
        notes.add(u, [(1, if_once(once_u, 1 + BELOW))], x, true, once_u);
        notes.add(v, [(1, u32::from(once_v))], x, true, once_v);
        notes.add(w, [(usize::from(w.0 < x), if_once(once_w, across))], x, w.0 < x, once_w);
        let gone = [(side_of_y(p.0), if_once(once_p, across))];
        notes.add(p, gone, x, p.0 < x, once_p & not_beside_x(p.0));
        let gone = [(side_of_y(q.0), u32::from(once_q))];
        notes.add(q, gone, x, q.0 < x, once_q & not_beside_x(q.0));
        let gone = [(side_of_y(r.0), if_once(once_r, 1 + BELOW))];
        notes.add(r, gone, x, r.0 < x, once_r & not_beside_x(r.0));
    }
    notes.tallies[b as usize][0] += merges + to_below * BELOW;
    changes.len = notes.len;
    changes.count_from(start);
    merges.into()
}

/// Joins regions of any size, one of each two perhaps a single `CELL` of the codebook.
fn join_regions<const CELL: bool, W: Word>(
    canvas: &mut Canvas<W>,
    merge: Merge,
    stride: u32,
    block: &[u64],
    neighbours: &mut Neighbours,
    changes: &mut Changes,
) -> u64 {
    let Merge { pair: Pair { a, b, .. }, offset, token } = merge;
    let step = offset.map(|offset| (offset.dy as u32).wrapping_mul(stride).wrapping_add(offset.dx as u32));
    let side_of_b = if a == b { 0 } else { 2 };
    let codebook = canvas.base_vocab_size;
    let two_cells = merge.pair.sizes.map(|size| size == 2);
    let start = changes.len;
    let mut merges = 0;
    for &place in block {
        let (x, y) = unpack(place);
        // One before it may have taken it.
        let (cells, border) = canvas.cells_to_merge();
        if !(is(cells, x, a) & is(cells, y, b)) {
            continue;
        }
        // Differences of positions are soon compared; two offsets may have the same.
        if step.is_some_and(|step| step != y - x)
            || offset.is_some_and(|offset| canvas.offset(x, y) != offset)
        {
            continue;
        }
        let (cells, _) = canvas.cells_to_merge();
        merges += 1;
        let most = neighbours.merge(cells, (x, y), two_cells, stride, token);
        let mut notes = changes.notes(most, token);
        neighbours.for_each(|Neighbour { region, of_x, of_y }| {
            let z = region.0;
            let (mut gone_x, mut gone_y) = (u32::from(of_x), u32::from(of_y));
            if CELL {
                // Single cells that are not side by side in a row are in a column.
                let below = |x: u32| u32::from(z.wrapping_sub(x).wrapping_add(1) & !2 != 0) * BELOW;
                gone_x *= 1 + u32::from(a < codebook) * below(x);
                gone_y *= 1 + u32::from(b < codebook) * below(y);
            }
            let gone = [(usize::from(z < x), gone_x), (side_of_b + usize::from(z < y), gone_y)];
            notes.add(region, gone, x, z < x, region.1 != border);
        });
        changes.len = notes.len;
    }
    changes.count_from(start);
    changes.tallies[b as usize][0] += merges;
    merges.into()
}

/// Sorts a list in which few places are far from where they belong.
fn sort_nearly_sorted(list: &mut [u64]) {
    let mut moves = 0;
    for i in 1..list.len() {
        let place = list[i];
        let mut to = i;
        while to > 0 && list[to - 1] > place {
            list[to] = list[to - 1];
            to -= 1;
        }
        list[to] = place;
        moves += i - to;
        if moves > 8 * list.len() {
            list.sort_unstable();
            return;
        }
    }
}

/// Counts the offsets of pairs of regions.
fn region_offsets<W: Word>(
    canvas: &Canvas<W>,
    (number, pair): (usize, Pair),
    stride: u32,
    list: &[u64],
    flat: &mut Vec<u32>,
    offsets: &mut Vec<((usize, Offset), u64)>,
) {
    // If rows are long enough, a difference of positions tells the offset.
    let size = pair.size();
    let most = size.saturating_mul(stride.into());
    if 2 * size > u64::from(stride) || most > MAX_FLAT {
        let start = offsets.len();
        for &place in list {
            let (x, y) = unpack(place);
            let offset = (number, canvas.offset(x, y));
            match offsets[start..].iter_mut().take(16).find(|(other, _)| *other == offset) {
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
            offsets.push(((number, Offset { dy: dy as i32, dx }), count.into()));
        }
    }
}
