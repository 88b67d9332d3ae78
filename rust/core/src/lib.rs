//! Visual byte-pair encoding (visual BPE): a two-dimensional BPE over grids of VQ ids.
//!
//! The path of a grid through the crate: [`Grid`] holds the ids, [`train()`] learns a [`Vocabulary`] from many grids,
//! an [`Encoder`] turns a grid into tokens with it, and [`Vocabulary::decode`] turns tokens back into ids.

mod decode;
mod encode;
mod error;
mod grid;
mod interrupt;
mod limits;
pub mod memory;
mod statistics;
mod threads;
mod train;
mod vocabulary;
mod workers;

pub use encode::{Dropout, EncodeOptions, EncodedBatch, Encoder, Encoding};
pub use error::{Error, Result};
pub use grid::{Grid, Offset, Regions, check_size};
pub use interrupt::Interrupt;
pub use limits::{MAX_CELLS, MAX_SIDE, MAX_VOCAB_SIZE};
pub use memory::HugePages;
pub use train::{Progress, TrainOptions, Trainer, train};
pub use vocabulary::{GridSize, Merge, MergeMode, Quantizer, Vocabulary};
