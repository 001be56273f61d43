//! What the allocator keeps. What it has given back to the kernel a clone would have to ask for again, and each way to and from the kernel that
//! was not gone before costs a clone that has no KVM more than all the memory.

/// Free memory at the end of the heap is given back from so many bytes on: more than the agent needs for a moment.
const TRIM: libc::c_int = 1 << 20;

/// Has the allocator keep what it has had. To be called before a thread is started: each that allocates would have a heap of its own.
pub(crate) fn keep() {
    for (parameter, value) in [(libc::M_ARENA_MAX, 1), (libc::M_TRIM_THRESHOLD, TRIM)] {
        // SAFETY: numbers alone, which mallopt(3) checks.
        unsafe { libc::mallopt(parameter, value) };
    }
}
