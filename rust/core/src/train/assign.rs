//! Which grid goes to which shard.
//!
//! Shards are worked on at the same time, merge after merge, so for every merge each should have as much to do as any
//! other. What a merge joins comes in clusters: many times in one grid, and in grids that are similar. So a grid goes
//! to the shard in which its ids are rarest so far. Shards then differ a third as much as after a choice at random.

use std::collections::BTreeMap;
use std::vec::IntoIter;

use crate::error::Result;
use crate::grid::Grid;
use crate::memory;

/// One in this number of ids is counted; odd, so that these are of all columns.
const SAMPLING_STEP: usize = 13;

/// What memory is for, in messages.
const PLACES: &str = "the places of the grids";

/// A shard and a position there.
type Place = (u32, u32);

/// Assigns grids to shards one by one.
#[derive(Debug)]
pub(super) struct GridAssigner {
    /// Per height and width of grids, for each shard the positions that are free.
    free_positions: BTreeMap<(u32, u32), Vec<IntoIter<u32>>>,
    /// Per shard, how often each id is in the samples of its grids.
    id_counts: Vec<Vec<u32>>,
    /// Per grid, its place once it has one.
    places: Vec<Option<Place>>,
}

impl GridAssigner {
    /// For `ids` ids and `grids` grids, and these positions in shards.
    pub fn new(
        ids: u32,
        grids: usize,
        shards: usize,
        positions: impl Iterator<Item = ((u32, u32), Place)>,
    ) -> Result<Self> {
        let mut free_positions = BTreeMap::new();
        for (size, (shard, position)) in positions {
            let of_size = free_positions.entry(size).or_insert_with(|| vec![Vec::new(); shards]);
            memory::push(&mut of_size[shard as usize], position, PLACES)?;
        }
        let free_positions = free_positions
            .into_iter()
            .map(|(size, shards)| (size, shards.into_iter().map(Vec::into_iter).collect()));
        let mut id_counts = Vec::new();
        for _ in 0..shards {
            id_counts.push(memory::zeros(ids as usize, "the counts of ids")?);
        }
        let free_positions = free_positions.collect();
        Ok(Self { free_positions, id_counts, places: memory::try_vec(grids, None, PLACES)? })
    }

    /// The places of grid `first` and those after it; a grid that has one keeps it.
    pub fn assign(&mut self, first: usize, grids: &[Grid]) -> Result<Vec<Place>> {
        let place = |(index, grid): (usize, &Grid)| {
            let place = self.places[index].unwrap_or_else(|| self.find_place(grid));
            self.places[index] = Some(place);
            place
        };
        memory::collect((first..).zip(grids).map(place), PLACES)
    }

    fn find_place(&mut self, grid: &Grid) -> Place {
        let size = (grid.height(), grid.width());
        let free_positions = self.free_positions.get_mut(&size).expect("grids of these sizes");
        // One shard needs no choice.
        let ids = if self.id_counts.len() > 1 { grid.ids() } else { &[] };
        let sample = || ids.iter().step_by(SAMPLING_STEP).map(|&id| id as usize);
        let similarity = |counts: &[u32]| sample().map(|id| u64::from(counts[id])).sum::<u64>();
        // Among the shards with a free position, the one whose grids are least similar.
        let shards = (0..).zip(&mut self.id_counts).zip(free_positions);
        let shards_with_room = shards.filter(|(_, positions)| positions.len() > 0);
        let choice = shards_with_room.min_by_key(|((_, counts), _)| similarity(counts));
        let ((shard, counts), positions) = choice.expect("room for every grid");
        // Its ids count from now on.
        sample().for_each(|id| counts[id] += 1);
        (shard, positions.next().expect("room for this grid"))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    fn assigner(sizes: &[(u32, u32)], shards: usize) -> GridAssigner {
        let place = |(number, &size)| (size, (number as u32 % shards as u32, number as u32));
        GridAssigner::new(10, sizes.len(), shards, (0..).zip(sizes).map(place)).unwrap()
    }

    proptest! {
        #[test]
        fn every_grid_has_a_place_of_its_own_and_keeps_it(
            sizes in prop::collection::vec((1..3_u32, 1..3_u32), 1..50),
            shards in 1..4_usize,
            first in any::<prop::sample::Index>(),
        ) {
            let grid = |(index, &(height, width)): (usize, &(u32, u32))| {
                let (height, width) = (height as usize, width as usize);
                Grid::new(index, height, width, vec![index as u32 % 10; height * width]).unwrap()
            };
            let grids: Vec<_> = sizes.iter().enumerate().map(grid).collect();
            let mut assigner = assigner(&sizes, shards);
            let first = first.index(grids.len());
            let last = assigner.assign(first, &grids[first..]).unwrap();
            let places = assigner.assign(0, &grids).unwrap();
            prop_assert_eq!(&places[first..], last);
            prop_assert_eq!(places.iter().collect::<HashSet<_>>().len(), grids.len());
            for (size, (shard, position)) in sizes.iter().zip(places) {
                prop_assert_eq!(&sizes[position as usize], size);
                prop_assert_eq!(position as usize % shards, shard as usize);
            }
        }

        #[test]
        fn similar_grids_go_to_different_shards(ids in Just((0..40).map(|id| id / 10).collect::<Vec<u32>>()).prop_shuffle()) {
            let grids: Vec<_> = ids.iter().map(|&id| Grid::new(0, 4, 4, vec![id; 16]).unwrap()).collect();
            let places = assigner(&[(4, 4); 40], 2).assign(0, &grids).unwrap();
            for kind in 0..4 {
                let of_kind = ids.iter().zip(&places).filter(|(id, _)| **id == kind);
                prop_assert_eq!(of_kind.filter(|(_, (shard, _))| *shard == 0).count(), 5);
            }
        }
    }
}
