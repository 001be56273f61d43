//! What the allocator keeps. Each pod has a shim of its own, which mostly waits: what it does not need goes back to the kernel, which
//! is 1.5 MB of what its start takes.

/// Free memory at the end of the heap is given back from so many bytes on. That it is set also keeps the allocator from raising it with the
/// longest that was ever freed: mallopt(3), M_MMAP_THRESHOLD.
const TRIM: libc::c_int = 256 * 1024;

/// Has the allocator keep little. To be called before a thread is started: each that allocates would have a heap of its own.
pub(crate) fn keep_small() {
    for (parameter, value) in [(libc::M_ARENA_MAX, 1), (libc::M_TRIM_THRESHOLD, TRIM)] {
        // SAFETY: numbers alone, which mallopt(3) checks. One that it does not know is a saving less.
        unsafe { libc::mallopt(parameter, value) };
    }
}
