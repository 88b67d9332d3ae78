//! Arrays in: whatever numpy can read as integers becomes grids of the core.
//!
//! Another thread may write to an array at any time: Python code when it gets the GIL, numpy and torch even without it.
//! Reading memory that is being written is undefined behaviour in Rust. So numpy copies an array's bytes, and Rust
//! reads only the copy, a Python object that never changes. It can be read without the GIL, so the threads that encode
//! ids also decode and check them. If an array is changed while numpy copies it, each id is the old or the new one, and
//! an id that is not in the codebook is an error as always.

use being_vl_core::{Error, Grid, check_size, memory};
use numpy::{PyArrayDescrMethods, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::exceptions::{PyException, PyMemoryError, PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::{PyBytes, PyIterator, PySlice, PyTuple};

use crate::errors::{GridError, to_python};

/// A block is complete when it has this many cells. With more, some threads may get none; with fewer, passing blocks to
/// threads takes long compared with encoding them.
const MIN_BLOCK_CELLS: usize = 1 << 15;

/// The name of all grids together in messages.
const GRIDS: &str = "grids";

/// What memory is for, in messages.
const NUMBERS: &str = "the numbers of an array";
pub(crate) const SIZES: &str = "the sizes of the grids";

/// A (height, width).
pub(crate) type Size = (usize, usize);

/// The numbers of an array in C order, as bytes.
struct Numbers {
    bytes: PyBackedBytes,
    /// Bytes of a number.
    width: usize,
    is_signed: bool,
    is_swapped: bool,
}

/// Why numbers cannot be decoded.
enum DecodeFault {
    /// A number that is negative or too large.
    Range { position: usize, value: i128 },
    /// There is no memory.
    Memory(Error),
}

impl Numbers {
    fn copy(array: &Bound<'_, PyUntypedArray>) -> PyResult<Self> {
        let py = array.py();
        let dtype = array.dtype();
        let bytes = if array.is_c_contiguous() {
            array.call_method0(intern!(py, "tobytes"))?
        } else {
            // `tobytes` of such an array copies number by number, which is much slower.
            let numpy = py.import(intern!(py, "numpy"))?;
            numpy.call_method1("ascontiguousarray", (array,))?.call_method0("tobytes")?
        };
        Ok(Self {
            bytes: bytes.cast_into::<PyBytes>()?.into(),
            width: dtype.itemsize(),
            is_signed: dtype.kind() == b'i',
            is_swapped: dtype.is_native_byteorder() == Some(false),
        })
    }

    /// The numbers in these bytes, or the first that is not in `0..limit`.
    fn decode(&self, bytes: &[u8], limit: u32) -> Result<Vec<u32>, DecodeFault> {
        fn decode<T, const N: usize>(
            bytes: &[u8],
            limit: u32,
            number: impl Fn([u8; N]) -> T,
        ) -> Result<Vec<u32>, DecodeFault>
        where
            T: TryInto<u32> + Into<i128>,
        {
            let (chunks, _) = bytes.as_chunks::<N>();
            let to_u32 = |&chunk: &[u8; N]| number(chunk).try_into().unwrap_or(u32::MAX);
            let numbers = memory::collect(chunks.iter().map(to_u32), NUMBERS).map_err(DecodeFault::Memory)?;
            match numbers.iter().max() {
                Some(&max) if max >= limit => {
                    let position = numbers.iter().position(|&number| number >= limit).unwrap_or(0);
                    Err(DecodeFault::Range { position, value: number(chunks[position]).into() })
                }
                _ => Ok(numbers),
            }
        }
        macro_rules! native_or_swapped {
            ($integer:ty) => {
                if self.is_swapped {
                    decode(bytes, limit, |bytes| <$integer>::from_ne_bytes(bytes).swap_bytes())
                } else {
                    decode(bytes, limit, <$integer>::from_ne_bytes)
                }
            };
        }
        match (self.is_signed, self.width) {
            (false, 1) => native_or_swapped!(u8),
            (false, 2) => native_or_swapped!(u16),
            (false, 4) => native_or_swapped!(u32),
            (false, _) => native_or_swapped!(u64),
            (true, 1) => native_or_swapped!(i8),
            (true, 2) => native_or_swapped!(i16),
            (true, 4) => native_or_swapped!(i32),
            (true, _) => native_or_swapped!(i64),
        }
    }
}

/// Copies of some grids.
pub(crate) struct Block {
    /// Index of the first of them.
    pub first: usize,
    sizes: Vec<Size>,
    /// The ids of grid after grid; each item has those of one grid or of several.
    numbers: Vec<Numbers>,
}

impl Block {
    fn new(first: usize) -> Self {
        Self { first, sizes: Vec::new(), numbers: Vec::new() }
    }

    /// Index of the grid after the last.
    pub fn end(&self) -> usize {
        self.first + self.sizes.len()
    }

    pub fn sizes(&self) -> &[Size] {
        &self.sizes
    }

    pub fn cells(&self) -> usize {
        self.sizes.iter().map(|(height, width)| height * width).sum()
    }

    /// The grids; every id is in the codebook.
    pub fn grids(&self, base_vocab_size: u32) -> being_vl_core::Result<Vec<Grid>> {
        let mut sizes = (self.first..).zip(&self.sizes);
        let mut grids = memory::with_capacity(self.sizes.len(), GRIDS)?;
        for numbers in &self.numbers {
            let mut rest = &numbers.bytes[..];
            while !rest.is_empty()
                && let Some((grid, &(height, width))) = sizes.next()
            {
                let (bytes, tail) = rest.split_at(rest.len().min(height * width * numbers.width));
                let ids = numbers.decode(bytes, base_vocab_size).map_err(|fault| match fault {
                    DecodeFault::Range { position, value } => {
                        let (row, column) = (position / width, position % width);
                        Error::GridId { grid, row, column, id: value, base_vocab_size }
                    }
                    DecodeFault::Memory(error) => error,
                })?;
                grids.push(Grid::new(grid, height, width, ids)?);
                rest = tail;
            }
        }
        Ok(grids)
    }

    /// Copies the grids of an array to the end of the block.
    fn extend(&mut self, array: &Bound<'_, PyUntypedArray>, sizes: &[Size]) -> PyResult<()> {
        for (index, &(height, width)) in (self.end()..).zip(sizes) {
            check_size(index, height, width).map_err(|error| to_python(&error))?;
        }
        let numbers = Numbers::copy(array)?;
        memory::extend(&mut self.sizes, sizes.iter().copied(), SIZES)
            .and_then(|()| memory::push(&mut self.numbers, numbers, GRIDS))
            .map_err(|error| to_python(&error))
    }
}

/// Grids from Python, block by block.
pub(crate) enum BlockReader<'py> {
    Stack(GridStack<'py>),
    /// An iterator of (H, W) arrays, and the index of the next.
    Iterator(Bound<'py, PyIterator>, usize),
}

impl<'py> BlockReader<'py> {
    /// Grids of an (N, H, W) array or of an iterable of (H, W) arrays.
    pub fn new(input: &Bound<'py, PyAny>) -> PyResult<Self> {
        Ok(match grid_stack(input)? {
            Some(stack) => Self::Stack(stack),
            None => Self::Iterator(grid_iterator(input)?, 0),
        })
    }

    /// The next block.
    pub fn next(&mut self) -> PyResult<Option<Block>> {
        match self {
            Self::Stack(stack) => stack.next(),
            Self::Iterator(items, index) => {
                let mut block = Block::new(*index);
                let mut cells = 0;
                while cells < MIN_BLOCK_CELLS
                    && let Some(item) = items.next()
                {
                    let array = grid_array(&item?, *index)?;
                    block.extend(&array, &[(array.shape()[0], array.shape()[1])])?;
                    cells += array.len();
                    *index += 1;
                }
                Ok((cells > 0).then_some(block))
            }
        }
    }
}

/// Grids in one array, one after the other: (N, H, W), or in raster order along a single axis.
pub(crate) struct GridStack<'py> {
    array: Bound<'py, PyUntypedArray>,
    sizes: Vec<Size>,
    /// Index of the first grid.
    first: usize,
    /// How many grids, and items of the first axis, have been copied.
    position: (usize, usize),
}

impl<'py> GridStack<'py> {
    pub fn new(array: Bound<'py, PyUntypedArray>, sizes: Vec<Size>, first: usize) -> Self {
        Self { array, sizes, first, position: (0, 0) }
    }

    pub fn sizes(&self) -> &[Size] {
        &self.sizes
    }

    /// The next block.
    pub fn next(&mut self) -> PyResult<Option<Block>> {
        let (grid, start) = self.position;
        let mut cells = 0;
        let is_next = |(height, width): &&Size| {
            let room = cells < MIN_BLOCK_CELLS;
            cells += if room { height * width } else { 0 };
            room
        };
        let number = self.sizes[grid..].iter().take_while(is_next).count();
        if number == 0 {
            return Ok(None);
        }
        let end = start + if self.array.ndim() == 1 { cells } else { number };
        let slice = PySlice::new(self.array.py(), start as isize, end as isize, 1);
        let part = self.array.get_item(slice)?.cast_into::<PyUntypedArray>()?;
        let mut block = Block::new(self.first + grid);
        block.extend(&part, &self.sizes[grid..grid + number])?;
        self.position = (grid + number, end);
        Ok(Some(block))
    }
}

/// The input as a stack if it is one array, not a sequence or another iterable of arrays.
pub(crate) fn grid_stack<'py>(input: &Bound<'py, PyAny>) -> PyResult<Option<GridStack<'py>>> {
    let is_array = match input.cast::<PyUntypedArray>() {
        Ok(array) => array.dtype().kind() != b'O' || array.ndim() == 0,
        Err(_) => input.hasattr("__array__")?,
    };
    if !is_array {
        return Ok(None);
    }
    let array = integers(input, GRIDS)?;
    match *array.shape() {
        [0] => Ok(None),
        [number, height, width] => {
            if number > 0 {
                check_size(0, height, width).map_err(|error| to_python(&error))?;
            }
            let sizes = memory::try_vec(number, (height, width), SIZES).map_err(|error| to_python(&error))?;
            Ok(Some(GridStack::new(array, sizes, 0)))
        }
        _ => Err(GridError::new_err(grids_message(&shape(&array)))),
    }
}

/// The items of an iterable of arrays.
pub(crate) fn grid_iterator<'py>(input: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyIterator>> {
    input.try_iter().map_err(|_| match input.get_type().name() {
        Ok(name) => PyTypeError::new_err(grids_message(&name.to_string())),
        Err(error) => error,
    })
}

/// The message for an input that is no grids.
fn grids_message(input: &str) -> String {
    format!("{GRIDS}: expected an (N, H, W) array or a sequence of (H, W) arrays, got {input}")
}

/// An (H, W) array.
pub(crate) fn grid_array<'py>(
    item: &Bound<'py, PyAny>,
    index: usize,
) -> PyResult<Bound<'py, PyUntypedArray>> {
    let array = integers(item, &format!("grid {index}"))?;
    if array.ndim() == 2 {
        return Ok(array);
    }
    Err(GridError::new_err(format!("grid {index}: expected an (H, W) array, got {}", shape(&array))))
}

/// Copies one (H, W) array.
pub(crate) fn copy_grid(input: &Bound<'_, PyAny>) -> PyResult<Block> {
    let array = grid_array(input, 0)?;
    let mut block = Block::new(0);
    block.extend(&array, &[(array.shape()[0], array.shape()[1])])?;
    Ok(block)
}

/// Copies a 1-D array of tokens.
pub(crate) fn copy_tokens(
    input: &Bound<'_, PyAny>,
    vocabulary: &being_vl_core::Vocabulary,
) -> PyResult<Vec<u32>> {
    let array = integers(input, "ids")?;
    if array.ndim() != 1 {
        return Err(GridError::new_err(format!("ids: expected a 1-D array, got {}", shape(&array))));
    }
    let numbers = Numbers::copy(&array)?;
    numbers.decode(&numbers.bytes, vocabulary.vocab_size()).map_err(|fault| match fault {
        DecodeFault::Range { position, value } => to_python(&vocabulary.token_error(position, value)),
        DecodeFault::Memory(error) => to_python(&error),
    })
}

/// Copies an array of counts of this shape, which are not negative and have 31 bits.
pub(crate) fn copy_counts(
    input: &Bound<'_, PyAny>,
    name: &str,
    expected_shape: &[usize],
) -> PyResult<Vec<u32>> {
    let array = integers(input, name)?;
    if array.shape() != expected_shape {
        let message =
            format!("{name}: expected an array of {}, got {}", tuple(expected_shape), shape(&array));
        return Err(GridError::new_err(message));
    }
    let numbers = Numbers::copy(&array)?;
    numbers.decode(&numbers.bytes, 1 << 31).map_err(|fault| match fault {
        DecodeFault::Range { position, value } => {
            GridError::new_err(format!("{name}: item {position} is {value}, expected 0 to {}", i32::MAX))
        }
        DecodeFault::Memory(error) => to_python(&error),
    })
}

/// The input as a numpy array of integers, which may be the caller's array itself.
pub(crate) fn integers<'py>(input: &Bound<'py, PyAny>, name: &str) -> PyResult<Bound<'py, PyUntypedArray>> {
    let array = match input.cast::<PyUntypedArray>() {
        Ok(array) => array.clone(),
        Err(_) => as_array(input, name)?,
    };
    // numpy makes an empty list an array of floats.
    if array.len() == 0 || matches!(array.dtype().kind(), b'i' | b'u') {
        Ok(array)
    } else {
        Err(integers_error(&array, name, &array.dtype().to_string()))
    }
}

fn as_array<'py>(input: &Bound<'py, PyAny>, name: &str) -> PyResult<Bound<'py, PyUntypedArray>> {
    let py = input.py();
    let numpy = py.import(intern!(py, "numpy"))?;
    let error = match numpy.call_method1(intern!(py, "asarray"), (input,)) {
        Ok(array) => return Ok(array.cast_into()?),
        Err(error) => error,
    };
    if !error.is_instance_of::<PyException>(py) || error.is_instance_of::<PyMemoryError>(py) {
        return Err(error);
    }
    if let Some(message) = ragged_row_message(input, name) {
        return Err(GridError::new_err(message));
    }
    // A tensor of a type that numpy lacks, or with a gradient, has floats.
    let floats = input.call_method0("detach").and_then(|tensor| tensor.call_method0("double"));
    if let Ok(floats) = floats.and_then(|floats| numpy.call_method1("asarray", (floats,)))
        && let (Ok(floats), Ok(dtype)) = (floats.cast_into(), input.getattr("dtype"))
    {
        return Err(integers_error(&floats, name, &dtype.to_string()));
    }
    let message = format!("{name}: {}", error.value(py));
    if error.is_instance_of::<PyValueError>(py) {
        Err(GridError::new_err(message))
    } else {
        Err(PyTypeError::new_err(message))
    }
}

/// The message for rows of different lengths, if that is what the input is.
fn ragged_row_message(input: &Bound<'_, PyAny>, name: &str) -> Option<String> {
    let first = input.get_item(0).and_then(|row| row.len()).ok()?;
    for (row, ids) in input.try_iter().ok()?.enumerate() {
        match ids.ok()?.len() {
            Ok(length) if length == first => {}
            Ok(length) => return Some(format!("{name}: row {row} has {length} ids, and row 0 has {first}")),
            Err(_) => return Some(format!("{name}: row {row} is no row of ids")),
        }
    }
    None
}

/// The error for an array that is not of integers; names the first value that is no whole number, or else the first
/// value.
fn integers_error(array: &Bound<'_, PyUntypedArray>, name: &str, dtype: &str) -> PyErr {
    let name_and_value = first_non_integer(array).map(|(place, value)| match (place.as_slice(), name) {
        (&[], _) => (name.to_owned(), format!(" ({value})")),
        (&[position], _) => (name.to_owned(), format!(" ({value} at position {position})")),
        (&[row, column], _) => (name.to_owned(), format!(" ({value} at row {row}, column {column})")),
        (&[grid, row, column], GRIDS) => {
            (format!("grid {grid}"), format!(" ({value} at row {row}, column {column})"))
        }
        (place, _) => (name.to_owned(), format!(" ({value} at index {place:?})")),
    });
    let (name, value) = name_and_value.unwrap_or_else(|_| (name.to_owned(), String::new()));
    PyTypeError::new_err(format!("{name}: expected integers, got dtype {dtype}{value}"))
}

/// Place and text of the first value that is no whole number, or else of the first value.
fn first_non_integer(array: &Bound<'_, PyUntypedArray>) -> PyResult<(Vec<usize>, String)> {
    let numpy = array.py().import("numpy")?;
    let position = match array.dtype().kind() {
        b'f' => {
            let is_whole = numpy.call_method1("equal", (array, numpy.call_method1("floor", (array,))?))?;
            let is_finite = numpy.call_method1("isfinite", (array,))?;
            numpy
                .call_method1("argmin", (numpy.call_method1("logical_and", (is_whole, is_finite))?,))?
                .extract()?
        }
        b'O' => {
            let is_no_integer = |item: PyResult<Bound<'_, PyAny>>| {
                item.is_ok_and(|item| item.extract::<u64>().is_err() && item.extract::<i64>().is_err())
            };
            array.getattr("flat")?.try_iter()?.position(is_no_integer).unwrap_or(0)
        }
        _ => 0_usize,
    };
    let shape = PyTuple::new(array.py(), array.shape())?;
    let place = numpy.call_method1("unravel_index", (position, shape))?;
    let value = array.get_item(&place)?.str()?.to_string();
    Ok((place.extract()?, value.chars().take(40).collect()))
}

pub(crate) fn shape(array: &Bound<'_, PyUntypedArray>) -> String {
    tuple(array.shape())
}

fn tuple(sides: &[usize]) -> String {
    let numbers: Vec<String> = sides.iter().map(ToString::to_string).collect();
    format!("shape ({}{})", numbers.join(", "), if sides.len() == 1 { "," } else { "" })
}
