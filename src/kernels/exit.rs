//! The end of the process while other threads compute.

/// Ends the process at once with an exit code, without the destructors of libraries: libtorch's fail while a thread is
/// still inside of it.
pub fn exit_now(code: i32) -> ! {
    #[cfg(target_os = "linux")]
    // SAFETY: takes a number and does not come back.
    unsafe {
        libc::_exit(code)
    }
    #[cfg(not(target_os = "linux"))]
    std::process::exit(code)
}
