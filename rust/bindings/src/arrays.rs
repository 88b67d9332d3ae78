//! Arrays in: whatever numpy can read as integers becomes grids of the core.
//!
//! Another thread may change an array at any time. So the core never sees an array's memory: cells are copied, each
//! read once and by its value, while the GIL is held, and what is checked is the copy. A change made meanwhile can only
//! make a cell's id the old or the new one, and an id that is not in the codebook is an error as always.

use being_vl_core::{Error, Grid, check_size};
use numpy::ndarray::{ArrayViewD, Axis};
use numpy::{
    Element, PyArrayDescrMethods, PyArrayDyn, PyArrayMethods, PyUntypedArray, PyUntypedArrayMethods,
};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::PySlice;

use crate::errors::{GridError, to_python};

/// Grids are handed on when they have this many cells: work enough for all threads, little enough to copy.
const BLOCK_CELLS: usize = 1 << 20;

/// Copies an (N, H, W) array or a sequence of (H, W) arrays block by block, checks every id against the codebook, and
/// gives each block to `work` with the index of its first grid.
pub(crate) fn blocks(
    input: &Bound<'_, PyAny>,
    base_vocab_size: u32,
    mut work: impl FnMut(usize, Vec<Grid>) -> PyResult<()>,
) -> PyResult<()> {
    let py = input.py();
    if is_array(input)? {
        let array = integers(input, "grids")?;
        if let &[number, height, width] = array.shape() {
            let size = (BLOCK_CELLS / (height * width).max(1)).max(1);
            for first in (0..number).step_by(size) {
                py.check_signals()?;
                let end = number.min(first + size);
                let block = array.get_item(PySlice::new(py, first as isize, end as isize, 1))?;
                let mut grids = Vec::with_capacity(end - first);
                read(block.cast::<PyUntypedArray>()?, base_vocab_size, first, &mut grids)?;
                work(first, grids)?;
            }
        } else if array.ndim() != 1 || array.len() > 0 {
            let message =
                format!("expected an (N, H, W) array or a sequence of (H, W) arrays, got {}", shape(&array));
            return Err(GridError::new_err(message));
        }
        return Ok(());
    }
    let (mut grids, mut cells) = (Vec::new(), 0);
    let mut items = input.try_iter()?.enumerate().peekable();
    while let Some((index, item)) = items.next() {
        py.check_signals()?;
        one(&item?, base_vocab_size, index, &mut grids)?;
        cells += grids.last().map_or(0, |grid| grid.ids().len());
        if cells >= BLOCK_CELLS || items.peek().is_none() {
            work(index + 1 - grids.len(), std::mem::take(&mut grids))?;
            cells = 0;
        }
    }
    Ok(())
}

/// Copies one (H, W) array.
pub(crate) fn grid(input: &Bound<'_, PyAny>, base_vocab_size: u32) -> PyResult<Grid> {
    let mut grids = Vec::with_capacity(1);
    one(input, base_vocab_size, 0, &mut grids)?;
    grids.pop().ok_or_else(|| GridError::new_err("expected a grid"))
}

/// Copies a 1-D array of tokens.
pub(crate) fn tokens(input: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
    let array = integers(input, "ids")?;
    if array.ndim() != 1 {
        return Err(GridError::new_err(format!("ids: expected a 1-D array, got {}", shape(&array))));
    }
    if array.len() == 0 { Ok(Vec::new()) } else { dispatch(&array, Tokens) }
}

/// Copies an (H, W) array of counts; what they mean is checked by the core.
pub(crate) fn plane(input: &Bound<'_, PyAny>, name: &str, height: usize, width: usize) -> PyResult<Vec<u32>> {
    let array = integers(input, name)?;
    if array.shape() != [height, width] {
        let message =
            format!("{name}: expected an array of shape ({height}, {width}), got {}", shape(&array));
        return Err(GridError::new_err(message));
    }
    dispatch(&array, Tokens)
}

fn one(item: &Bound<'_, PyAny>, base_vocab_size: u32, index: usize, grids: &mut Vec<Grid>) -> PyResult<()> {
    let array = integers(item, &format!("grid {index}"))?;
    if array.ndim() != 2 {
        let message = format!("grid {index}: expected an (H, W) array, got {}", shape(&array));
        return Err(GridError::new_err(message));
    }
    read(&array, base_vocab_size, index, grids)
}

/// Whether the input is one array rather than a sequence of arrays: numpy's own, or of a kind that it can read.
pub(crate) fn is_array(input: &Bound<'_, PyAny>) -> PyResult<bool> {
    if let Ok(array) = input.cast::<PyUntypedArray>() {
        return Ok(array.dtype().kind() != b'O');
    }
    input.hasattr("__array__")
}

/// The input as a numpy array of a native integer type, aligned, with strides of whole elements.
pub(crate) fn integers<'py>(input: &Bound<'py, PyAny>, name: &str) -> PyResult<Bound<'py, PyUntypedArray>> {
    let py = input.py();
    let array = match input.cast::<PyUntypedArray>() {
        Ok(array) => array.clone(),
        Err(_) => py.import("numpy")?.call_method1("asarray", (input,))?.cast_into::<PyUntypedArray>()?,
    };
    let dtype = array.dtype();
    // numpy makes an empty list an array of floats.
    let empty_list = array.ndim() == 1 && array.len() == 0;
    if !empty_list && !matches!(dtype.kind(), b'i' | b'u') {
        return Err(PyTypeError::new_err(format!("{name}: expected integers, got dtype {dtype}")));
    }
    let size = dtype.itemsize().max(1) as isize;
    let plain = array.is_aligned() && array.strides().iter().all(|stride| stride % size == 0);
    if plain && dtype.is_native_byteorder() != Some(false) {
        return Ok(array);
    }
    let native = dtype.call_method1("newbyteorder", ("=",))?;
    Ok(array.call_method1("astype", (native,))?.cast_into::<PyUntypedArray>()?)
}

pub(crate) fn shape(array: &Bound<'_, PyUntypedArray>) -> String {
    let sides: Vec<String> = array.shape().iter().map(ToString::to_string).collect();
    format!("shape ({}{})", sides.join(", "), if sides.len() == 1 { "," } else { "" })
}

/// Appends the array's grids (3-D) or the array as a grid (2-D); `first` is the index of the first one.
fn read(
    array: &Bound<'_, PyUntypedArray>,
    base_vocab_size: u32,
    first: usize,
    grids: &mut Vec<Grid>,
) -> PyResult<()> {
    dispatch(array, Grids { base_vocab_size, first, found: grids })
}

/// Something to do with an array's elements, whatever integer type they have.
pub(crate) trait Visitor {
    type Output;
    fn visit<T: Copy + Into<i128> + TryInto<u32>>(
        self,
        py: Python<'_>,
        view: ArrayViewD<'_, T>,
    ) -> PyResult<Self::Output>;
}

pub(crate) fn dispatch<V: Visitor>(array: &Bound<'_, PyUntypedArray>, visitor: V) -> PyResult<V::Output> {
    fn visit<T: Element + Copy + Into<i128> + TryInto<u32>, V: Visitor>(
        array: &Bound<'_, PyArrayDyn<T>>,
        visitor: V,
    ) -> PyResult<V::Output> {
        let array = array.try_readonly().map_err(|error| GridError::new_err(error.to_string()))?;
        visitor.visit(array.py(), array.as_array())
    }
    macro_rules! try_types {
        ($($integer:ty),*) => {
            $(if let Ok(array) = array.cast::<PyArrayDyn<$integer>>() {
                return visit(array, visitor);
            })*
        };
    }
    try_types!(u8, u16, u32, u64, i8, i16, i32, i64);
    Err(PyTypeError::new_err(format!("expected integers, got dtype {}", array.dtype())))
}

struct Tokens;

impl Visitor for Tokens {
    type Output = Vec<u32>;
    fn visit<T: Copy + Into<i128> + TryInto<u32>>(
        self,
        _: Python<'_>,
        view: ArrayViewD<'_, T>,
    ) -> PyResult<Vec<u32>> {
        // What does not fit becomes the largest number, which no token, index or leaf is.
        Ok(view.iter().map(|&value| value.try_into().unwrap_or(u32::MAX)).collect())
    }
}

struct Grids<'a> {
    base_vocab_size: u32,
    first: usize,
    found: &'a mut Vec<Grid>,
}

impl Visitor for Grids<'_> {
    type Output = ();
    fn visit<T: Copy + Into<i128> + TryInto<u32>>(
        self,
        py: Python<'_>,
        view: ArrayViewD<'_, T>,
    ) -> PyResult<()> {
        let Self { base_vocab_size, first, found } = self;
        let mut push = |index: usize, view: ArrayViewD<'_, T>| {
            let (height, width) = (view.shape()[0], view.shape()[1]);
            check_size(index, height, width)?;
            let id = |&value: &T| value.try_into().unwrap_or(u32::MAX);
            let ids = match view.as_slice() {
                Some(values) => values.iter().map(id).collect(),
                None => view.iter().map(id).collect(),
            };
            let grid = Grid::new(index, height, width, ids)?;
            grid.check_ids(index, base_vocab_size).map_err(|error| match error {
                // What does not fit the copy is told as it stands in the array.
                Error::GridId { row, column, .. } => {
                    let id = view[[row, column].as_slice()].into();
                    Error::GridId { grid: index, row, column, id, base_vocab_size }
                }
                other => other,
            })?;
            found.push(grid);
            Ok::<_, Error>(())
        };
        if view.ndim() == 2 {
            return push(first, view).map_err(|error| to_python(&error));
        }
        for (index, view) in view.axis_iter(Axis(0)).enumerate() {
            py.check_signals()?;
            push(first + index, view).map_err(|error| to_python(&error))?;
        }
        Ok(())
    }
}
