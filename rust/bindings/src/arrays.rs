//! Arrays in: whatever numpy can read as integers becomes grids of the core.

use being_vl_core::{Error, Grid};
use numpy::ndarray::{ArrayViewD, Axis};
use numpy::{
    Element, PyArrayDescrMethods, PyArrayDyn, PyArrayMethods, PyUntypedArray, PyUntypedArrayMethods,
};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;

use crate::errors::{GridError, to_python};

/// Copies an (N, H, W) array or a sequence of (H, W) arrays, and checks every id against the codebook.
pub(crate) fn grids(input: &Bound<'_, PyAny>, base_vocab_size: u32) -> PyResult<Vec<Grid>> {
    let py = input.py();
    if is_array(input)? {
        let array = integers(input, "grids")?;
        if array.ndim() == 3 {
            let mut grids = Vec::with_capacity(array.shape()[0]);
            read(&array, base_vocab_size, 0, &mut grids)?;
            return Ok(grids);
        }
        if array.ndim() != 1 || array.len() > 0 {
            let message =
                format!("expected an (N, H, W) array or a sequence of (H, W) arrays, got {}", shape(&array));
            return Err(GridError::new_err(message));
        }
        return Ok(Vec::new());
    }
    let mut grids = Vec::new();
    for (index, item) in input.try_iter()?.enumerate() {
        py.check_signals()?;
        one(&item?, base_vocab_size, index, &mut grids)?;
    }
    Ok(grids)
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
            let mut ids = Vec::with_capacity(view.len());
            for (position, &value) in view.iter().enumerate() {
                match value.try_into() {
                    Ok(id) if id < base_vocab_size => ids.push(id),
                    _ => {
                        let (row, column) = (position / width, position % width);
                        let id = value.into();
                        return Err(Error::GridId { grid: index, row, column, id, base_vocab_size });
                    }
                }
            }
            found.push(Grid::new(index, height, width, ids)?);
            Ok(())
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
