//! The parts of training and encoding by themselves, on random grids: `cargo bench -p being-vl-core`.
//!
//! For the whole beside other programs, on grids of photographs, see `benchmarks/bpe`.

use std::hint::black_box;

use being_vl_core::{
    EncodeOptions, Encoder, Grid, Interrupt, MergeMode, TrainOptions, Trainer, Vocabulary, train,
};
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};

const SIDE: usize = 32;
const K: u32 = 4096;

/// Grids in which most cells repeat the cell on the left or above, and the others prefer small ids.
fn grids(count: usize) -> Vec<Grid> {
    let mut state = 1_u64;
    let mut random = |limit: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % limit
    };
    let mut grid = |index| {
        let mut ids: Vec<u32> = Vec::with_capacity(SIDE * SIDE);
        for cell in 0..SIDE * SIDE {
            ids.push(match random(10) {
                0..=2 if cell % SIDE > 0 => ids[cell - 1],
                3..=5 if cell >= SIDE => ids[cell - SIDE],
                _ => (random(u64::from(K)) * random(u64::from(K)) / u64::from(K)) as u32,
            });
        }
        Grid::new(index, SIDE, SIDE, ids).unwrap()
    };
    (0..count).map(&mut grid).collect()
}

fn options(merge_mode: MergeMode, num_merges: usize) -> TrainOptions {
    TrainOptions { base_vocab_size: K, num_merges, merge_mode, num_threads: 1, ..TrainOptions::default() }
}

fn learn(grids: &[Grid], merge_mode: MergeMode) -> Vocabulary {
    train(grids, &options(merge_mode, 2048), |_| (), &Interrupt::default()).unwrap()
}

/// A trainer with all grids set.
fn trainer_with_grids(grids: &[Grid], merge_mode: MergeMode) -> Trainer {
    let trainer = Trainer::new(&vec![(SIDE, SIDE); grids.len()], options(merge_mode, 2048), None).unwrap();
    trainer.set_grids(0, grids).unwrap();
    trainer
}

fn training(criterion: &mut Criterion) {
    let grids = grids(500);
    let mut group = criterion.benchmark_group("training");
    group.sample_size(10);
    let run = |trainer: &mut Trainer, limit| trainer.run(limit, |_| (), &Interrupt::default()).unwrap();
    group.bench_function("set grids", |bench| bench.iter(|| trainer_with_grids(&grids, MergeMode::Pair)));
    group.bench_function("count and index", |bench| {
        let start = || trainer_with_grids(&grids, MergeMode::Pair);
        bench.iter_batched_ref(start, |trainer| run(trainer, 0), BatchSize::LargeInput);
    });
    for mode in [MergeMode::Pair, MergeMode::Oriented] {
        // The first merges join many regions each, the later ones few.
        for (from, to) in [(0, 64), (64, 2048)] {
            group.bench_function(format!("merges {from} to {to}, {mode:?}"), |bench| {
                let start = || {
                    let mut trainer = trainer_with_grids(&grids, mode);
                    run(&mut trainer, from);
                    trainer
                };
                bench.iter_batched_ref(start, |trainer| run(trainer, to), BatchSize::LargeInput);
            });
        }
    }
}

fn encoding(criterion: &mut Criterion) {
    let grids = grids(500);
    let mut group = criterion.benchmark_group("encoding");
    for mode in [MergeMode::Pair, MergeMode::Oriented] {
        let vocabulary = learn(&grids, mode);
        let encoder = Encoder::new(&vocabulary).unwrap();
        let interrupt = Interrupt::default();
        let default_options = EncodeOptions::default();
        let with_regions = EncodeOptions { regions: true, ..default_options };
        group.throughput(Throughput::Elements((SIDE * SIDE) as u64));
        group.bench_function(format!("one grid, {mode:?}"), |bench| {
            bench.iter(|| encoder.encode(black_box(&grids[0]), &default_options, &interrupt).unwrap());
        });
        group.bench_function(format!("one grid with regions, {mode:?}"), |bench| {
            bench.iter(|| encoder.encode(black_box(&grids[0]), &with_regions, &interrupt).unwrap());
        });
        let encoding = encoder.encode(&grids[0], &with_regions, &interrupt).unwrap();
        group.bench_function(format!("decode by regions, {mode:?}"), |bench| {
            bench.iter(|| vocabulary.decode(&encoding.ids, SIDE, SIDE, encoding.regions.as_ref()).unwrap());
        });
        if mode == MergeMode::Oriented {
            group.bench_function("decode ids alone, Oriented", |bench| {
                bench.iter(|| vocabulary.decode(&encoding.ids, SIDE, SIDE, None).unwrap());
            });
        }
        group.throughput(Throughput::Elements((grids.len() * SIDE * SIDE) as u64));
        group.bench_function(format!("500 grids, {mode:?}"), |bench| {
            bench.iter(|| encoder.encode_batch(black_box(&grids), &default_options, 1, &interrupt).unwrap());
        });
    }
}

fn files(criterion: &mut Criterion) {
    let vocabulary = learn(&grids(500), MergeMode::Oriented);
    let text = vocabulary.to_json().unwrap();
    let mut group = criterion.benchmark_group("files");
    group.bench_function("write", |bench| bench.iter(|| vocabulary.to_json().unwrap()));
    group.bench_function("read", |bench| bench.iter(|| Vocabulary::from_json(black_box(&text)).unwrap()));
    group.bench_function("make an encoder", |bench| bench.iter(|| Encoder::new(black_box(&vocabulary))));
}

criterion_group! {
    name = parts;
    config = Criterion::default().without_plots();
    targets = training, encoding, files
}
criterion_main!(parts);
