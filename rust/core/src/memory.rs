//! Large blocks of memory on huge pages, and prefetching.

#![expect(unsafe_code, reason = "neither an allocator nor a prefetch can be written without")]

use std::alloc::{GlobalAlloc, Layout, System};

/// Blocks of at least this many bytes go to huge pages, as numpy's arrays do.
const MIN_HUGE_BLOCK: usize = 1 << 22;

/// The system's allocator, which asks Linux for huge pages where blocks are large. Cells are read in no order, and each
/// page takes time when it is first written and whenever its address is looked up.
pub struct HugePages;

// SAFETY: every call goes to `System` with the same arguments, and its result is returned. In between, the kernel is
// only told how to back the memory, which changes neither its content nor its address.
unsafe impl GlobalAlloc for HugePages {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps the contract of `alloc`, which is the same.
        advise(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        advise(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as above; the block came from `System` with this layout.
        advise(unsafe { System.realloc(block, layout, size) }, size)
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(block, layout) }
    }
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
