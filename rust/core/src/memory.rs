//! Memory: buffers whose failure is an error, large blocks on huge pages, and prefetching.
//!
//! By itself Rust ends the process when there is no memory. So whatever grows with the input is taken by the functions
//! here, which return [`Error::Memory`]. What is small is not checked one by one: if there is no memory for it,
//! [`HugePages`] gives back a reserve that it held, and the work ends with the same error at the next look at its
//! [`Interrupt`](crate::Interrupt).

#![expect(unsafe_code, reason = "neither an allocator nor a prefetch can be written without")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::ptr::{null_mut, slice_from_raw_parts_mut};
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use crate::error::{Error, Result};

/// Blocks of at least this many bytes go to huge pages, as numpy's arrays do.
const MIN_HUGE_BLOCK: usize = 1 << 22;

/// The system's allocator, which asks Linux for huge pages where blocks are large. Cells are read in no order, and each
/// page takes time when it is first written and whenever its address is looked up.
pub struct HugePages;

// SAFETY: every call goes to `System` with the same arguments, perhaps twice, and its result is returned. In between, the
// kernel is only told how to back the memory, which changes neither its content nor its address.
unsafe impl GlobalAlloc for HugePages {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps the contract of `alloc`, which is the same.
        with_reserve(layout.size(), || unsafe { System.alloc(layout) })
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        with_reserve(layout.size(), || unsafe { System.alloc_zeroed(layout) })
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as above; the block came from `System` with this layout, and is as it was if the first try failed.
        with_reserve(size, || unsafe { System.realloc(block, layout, size) })
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(block, layout) }
    }
}

/// The block that `allocate` returns, perhaps after the reserve has been given back.
#[inline]
fn with_reserve(size: usize, allocate: impl Fn() -> *mut u8) -> *mut u8 {
    // What was the reserve is for small things; another thread must not take it for one large block.
    if size > MAX_BLOCK_OF_RESERVE && is_short() {
        return null_mut();
    }
    let mut block = allocate();
    if block.is_null() && give_back_reserve(size) {
        block = allocate();
    }
    advise(block, size)
}

/// Memory that is never written, for small things when there is no other.
static RESERVE: AtomicPtr<u8> = AtomicPtr::new(null_mut());

/// Size of the small block that the reserve was given back for; 0 as long as there is memory.
static MISSING_BYTES: AtomicUsize = AtomicUsize::new(0);

const RESERVE_SIZE: usize = 1 << 24;

/// Larger blocks are asked for by the functions below, which need no reserve.
const MAX_SMALL_BLOCK: usize = 1 << 20;

/// While the reserve is given back, larger blocks are refused; their size is known only to the functions below.
const MAX_BLOCK_OF_RESERVE: usize = 1 << 16;

const RESERVE_LAYOUT: Layout = match Layout::from_size_align(RESERVE_SIZE, 16) {
    Ok(layout) => layout,
    Err(_) => panic!("a power of two"),
};

/// Gives the reserve back to the system for a small block. Returns whether it may be there now.
#[cold]
fn give_back_reserve(size: usize) -> bool {
    if size > MAX_SMALL_BLOCK {
        return false;
    }
    let reserve = RESERVE.swap(null_mut(), Ordering::AcqRel);
    if !reserve.is_null() {
        MISSING_BYTES.store(size.max(1), Ordering::Release);
        // SAFETY: it came from `System` with this layout, and was swapped out, so nobody else frees it.
        unsafe { System.dealloc(reserve, RESERVE_LAYOUT) };
    }
    // If another thread has just given it back, this one gets some of it.
    MISSING_BYTES.load(Ordering::Acquire) > 0
}

/// Makes sure that there is a reserve: when work begins, and whenever it takes more memory.
#[inline]
pub(crate) fn hold_reserve() -> Result<()> {
    if RESERVE.load(Ordering::Relaxed).is_null() { take_reserve() } else { Ok(()) }
}

#[cold]
fn take_reserve() -> Result<()> {
    // SAFETY: the layout is not empty.
    let block = unsafe { System.alloc(RESERVE_LAYOUT) };
    if block.is_null() {
        return Err(Error::Memory { bytes: RESERVE_SIZE, purpose: "a reserve for small things" });
    }
    if RESERVE.compare_exchange(null_mut(), block, Ordering::AcqRel, Ordering::Relaxed).is_err() {
        // SAFETY: another thread was faster, and nobody else knows this block.
        unsafe { System.dealloc(block, RESERVE_LAYOUT) };
    }
    MISSING_BYTES.store(0, Ordering::Release);
    Ok(())
}

/// Gives memory that nothing uses back to the system, which the allocator of C keeps for later, more of it after each
/// training that is stopped on several threads.
pub fn give_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: blocks that are in use stay as they are.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Whether the reserve had to be given back.
#[inline]
pub(crate) fn is_short() -> bool {
    MISSING_BYTES.load(Ordering::Relaxed) > 0
}

/// Fails if the reserve had to be given back.
#[inline]
pub(crate) fn check_reserve() -> Result<()> {
    match MISSING_BYTES.load(Ordering::Relaxed) {
        0 => Ok(()),
        bytes => Err(Error::Memory { bytes, purpose: "one of many small lists" }),
    }
}

/// The default of Rust's threads, in bytes.
const STACK_SIZE: usize = 1 << 21;

/// Fails if there is no room for the stacks of this many threads, and for what each takes when it begins, without which
/// the C library ends the process.
pub(crate) fn check_stacks(threads: usize) -> Result<()> {
    const SPARE: usize = 1 << 23;
    let bytes = threads.saturating_mul(STACK_SIZE + (1 << 20)).saturating_add(SPARE);
    if threads == 0 || can_map(bytes) {
        Ok(())
    } else {
        Err(Error::Memory { bytes, purpose: "the stacks of threads" })
    }
}

/// The error for threads that could not be started: [`Error::Memory`] if there is no room for their stacks.
pub fn thread_error(threads: usize, reason: &impl ToString) -> Error {
    // Much more, since what the work held when they failed may have been given back since.
    let bytes = threads.saturating_add(32).saturating_mul(STACK_SIZE);
    if can_map(bytes) {
        Error::Threads { threads, reason: reason.to_string() }
    } else {
        Error::Memory { bytes, purpose: "the stacks of threads" }
    }
}

/// Whether the system has this much memory for a stack, which comes from it directly.
fn can_map(bytes: usize) -> bool {
    #[cfg(target_os = "linux")]
    {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the mapping is new, nothing is written to it, and it is given back whole.
        unsafe {
            let block =
                libc::mmap(null_mut(), bytes, protection, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0);
            block != libc::MAP_FAILED && libc::munmap(block, bytes) == 0
        }
    }
    #[cfg(not(target_os = "linux"))]
    with_capacity::<u8>(bytes, "the stacks of threads").is_ok()
}

/// The error for a list of `len` items.
#[cold]
fn memory_error<T>(len: usize, purpose: &'static str) -> Error {
    Error::Memory { bytes: len.saturating_mul(size_of::<T>()), purpose }
}

/// Makes room for this many more items, and for some to come.
#[inline]
pub(crate) fn reserve<T>(list: &mut Vec<T>, number: usize, purpose: &'static str) -> Result<()> {
    if number <= list.capacity() - list.len() {
        return Ok(());
    }
    hold_reserve()?;
    list.try_reserve(number).map_err(|_| memory_error::<T>(list.len().saturating_add(number), purpose))
}

/// Makes room for exactly this many more items.
pub(crate) fn reserve_exact<T>(list: &mut Vec<T>, number: usize, purpose: &'static str) -> Result<()> {
    hold_reserve()?;
    list.try_reserve_exact(number).map_err(|_| memory_error::<T>(list.len().saturating_add(number), purpose))
}

/// No items, with room for this many.
///
/// # Errors
/// [`Error::Memory`].
pub fn with_capacity<T>(capacity: usize, purpose: &'static str) -> Result<Vec<T>> {
    let mut list = Vec::new();
    reserve_exact(&mut list, capacity, purpose)?;
    Ok(list)
}

/// The same item this many times.
///
/// # Errors
/// [`Error::Memory`].
pub fn try_vec<T: Clone>(len: usize, item: T, purpose: &'static str) -> Result<Vec<T>> {
    let mut list = with_capacity(len, purpose)?;
    list.resize(len, item);
    Ok(list)
}

/// Shortens a list, or adds the same item until it is this long.
#[inline]
pub(crate) fn resize<T: Clone>(list: &mut Vec<T>, len: usize, item: T, purpose: &'static str) -> Result<()> {
    reserve(list, len.saturating_sub(list.len()), purpose)?;
    list.resize(len, item);
    Ok(())
}

/// Adds the same item until a list is at least this long.
#[inline]
pub(crate) fn lengthen<T: Clone>(
    list: &mut Vec<T>,
    len: usize,
    item: T,
    purpose: &'static str,
) -> Result<()> {
    if len <= list.len() { Ok(()) } else { resize(list, len, item, purpose) }
}

/// Adds an item.
///
/// # Errors
/// [`Error::Memory`].
#[inline]
pub fn push<T>(list: &mut Vec<T>, item: T, purpose: &'static str) -> Result<()> {
    reserve(list, 1, purpose)?;
    list.push(item);
    Ok(())
}

/// Adds copies of items.
#[inline]
pub(crate) fn extend_from_slice<T: Copy>(
    list: &mut Vec<T>,
    items: &[T],
    purpose: &'static str,
) -> Result<()> {
    reserve(list, items.len(), purpose)?;
    list.extend_from_slice(items);
    Ok(())
}

/// Adds the items of an iterator.
///
/// # Errors
/// [`Error::Memory`].
pub fn extend<T>(list: &mut Vec<T>, items: impl IntoIterator<Item = T>, purpose: &'static str) -> Result<()> {
    let items = items.into_iter();
    let (min, max) = items.size_hint();
    reserve(list, min, purpose)?;
    if max == Some(min) {
        list.extend(items);
        return Ok(());
    }
    for item in items {
        push(list, item, purpose)?;
    }
    Ok(())
}

/// The items of an iterator.
///
/// # Errors
/// [`Error::Memory`].
pub fn collect<T>(items: impl IntoIterator<Item = T>, purpose: &'static str) -> Result<Vec<T>> {
    let items = items.into_iter();
    let mut list = with_capacity(items.size_hint().0, purpose)?;
    extend(&mut list, items, purpose)?;
    Ok(list)
}

/// Numbers that are 0 if all their bits are.
///
/// # Safety
/// All bits 0 must be a value of the type.
pub(crate) unsafe trait Number: Copy {}

// SAFETY: all bits 0 are the number 0, and so for several numbers.
unsafe impl Number for u8 {}
unsafe impl Number for u32 {}
unsafe impl Number for u64 {}
unsafe impl Number for usize {}
unsafe impl<T: Number, const N: usize> Number for [T; N] {}

/// This many zeros. Pages that are not written take no memory and no time.
pub(crate) fn zeros<T: Number>(len: usize, purpose: &'static str) -> Result<Vec<T>> {
    let error = || memory_error::<T>(len, purpose);
    let layout = Layout::array::<T>(len).map_err(|_| error())?;
    if layout.size() == 0 {
        return Ok(Vec::new());
    }
    // SAFETY: the layout is not empty.
    let block = unsafe { std::alloc::alloc_zeroed(layout) }.cast::<T>();
    if block.is_null() {
        return Err(error());
    }
    // SAFETY: the list gets a block of its own with the layout of `len` items, which are all there, since their type is
    // a `Number`.
    let items = unsafe { Box::from_raw(slice_from_raw_parts_mut(block, len)) };
    Ok(items.into_vec())
}

/// Returns the block; pages of it that are not in use yet will be huge, if the kernel can.
#[inline]
fn advise(block: *mut u8, size: usize) -> *mut u8 {
    #[cfg(target_os = "linux")]
    if size >= MIN_HUGE_BLOCK && !block.is_null() {
        // SAFETY: asks for a number.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) }.max(1) as usize;
        let offset_in_page = block as usize % page;
        // SAFETY: this advice never changes memory, and an error means that nothing happens. The range begins at the
        // start of the block's first page, where the allocator keeps data of its own, so that this page is huge, too.
        unsafe {
            libc::madvise(
                block.wrapping_sub(offset_in_page).cast(),
                size + offset_in_page,
                libc::MADV_HUGEPAGE,
            )
        };
    }
    block
}

/// Begins to load an item's cache line, if there is such an item and the processor has an instruction for it.
#[inline]
pub(crate) fn prefetch<T>(items: &[T], index: usize) {
    let address = items.as_ptr().wrapping_add(index);
    #[cfg(target_arch = "x86_64")]
    // SAFETY: this hint reads and writes nothing and is ignored for addresses that are not there.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(address.cast());
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as above.
    unsafe {
        std::arch::asm!("prfm pldl1keep, [{}]", in(reg) address, options(nostack, readonly, preserves_flags));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = address;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_that_no_memory_can_hold_are_errors() {
        const HUGE: usize = usize::MAX / 16;
        let purpose = "a test";
        let error = |len: usize| Error::Memory { bytes: 8 * len, purpose };
        assert_eq!(zeros::<u64>(HUGE, purpose), Err(error(HUGE)));
        assert_eq!(try_vec(HUGE, 1_u64, purpose), Err(error(HUGE)));
        assert_eq!(with_capacity::<u64>(HUGE, purpose), Err(error(HUGE)));
        assert_eq!(zeros::<u64>(usize::MAX, purpose), Err(Error::Memory { bytes: usize::MAX, purpose }));
        let mut list = vec![7_u64];
        assert_eq!(reserve(&mut list, HUGE, purpose), Err(error(HUGE + 1)));
        assert_eq!(resize(&mut list, HUGE, 1, purpose), Err(error(HUGE)));
        assert_eq!(list, [7]);
    }

    #[test]
    fn lists_hold_what_plain_ones_do() {
        assert_eq!(zeros::<[u32; 2]>(3, "").unwrap(), [[0, 0]; 3]);
        assert!(zeros::<u8>(0, "").unwrap().is_empty());
        let mut list: Vec<i32> = collect((0..10).filter(|number| number % 3 == 0), "").unwrap();
        extend(&mut list, 20..22, "").unwrap();
        extend_from_slice(&mut list, &[30, 31], "").unwrap();
        push(&mut list, 40, "").unwrap();
        lengthen(&mut list, 3, 50, "").unwrap();
        lengthen(&mut list, 10, 50, "").unwrap();
        assert_eq!(list, [0, 3, 6, 9, 20, 21, 30, 31, 40, 50]);
    }

    #[test]
    fn items_out_of_range_can_be_prefetched() {
        let items = [1_u64, 2, 3];
        for index in [0, 2, 3, 1 << 20, usize::MAX / 2, usize::MAX] {
            prefetch(&items, index);
            prefetch::<u64>(&[], index);
        }
        assert_eq!(items, [1, 2, 3]);
    }

    #[test]
    fn blocks_hold_what_is_written_when_they_grow_and_shrink() {
        for align in [1, 8, 4096] {
            let layout = |size| Layout::from_size_align(size, align).unwrap();
            let sizes = [MIN_HUGE_BLOCK - 1, MIN_HUGE_BLOCK, 3 * MIN_HUGE_BLOCK, 5 * MIN_HUGE_BLOCK + 7, 100];
            // SAFETY: nothing is read or written but within the block, which is used with its layout and freed once.
            unsafe {
                let zero_block = HugePages.alloc_zeroed(layout(MIN_HUGE_BLOCK));
                assert!((0..MIN_HUGE_BLOCK).all(|i| *zero_block.add(i) == 0));
                HugePages.dealloc(zero_block, layout(MIN_HUGE_BLOCK));
                let mut block = HugePages.alloc(layout(sizes[0]));
                (0..sizes[0]).for_each(|i| *block.add(i) = i as u8);
                for pair in sizes.windows(2) {
                    block = HugePages.realloc(block, layout(pair[0]), pair[1]);
                    assert_eq!(block as usize % align, 0);
                    assert!((0..pair[0].min(pair[1])).all(|i| *block.add(i) == i as u8));
                    (0..pair[1]).for_each(|i| *block.add(i) = i as u8);
                }
                HugePages.dealloc(block, layout(100));
            }
        }
    }
}
