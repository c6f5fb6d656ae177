//! Makes system calls that a container must not make and prints what the kernel answers, one `name errno` per line.
//! A test runs it inside a container.

fn main() {
    let zero = 0usize;
    let calls: [(&str, libc::c_long, [usize; 3]); 8] = [
        ("keyctl", libc::SYS_keyctl, [0, zero, zero]),
        ("add_key", libc::SYS_add_key, [zero, zero, zero]),
        ("bpf", libc::SYS_bpf, [zero, zero, zero]),
        ("io_uring_setup", libc::SYS_io_uring_setup, [1, zero, zero]),
        ("perf_event_open", libc::SYS_perf_event_open, [zero, zero, zero]),
        ("clone3", libc::SYS_clone3, [zero, zero, zero]),
        ("vsock", libc::SYS_socket, [40, 1, 0]),
        ("nosuchcall", 9999, [zero, zero, zero]),
    ];
    for (name, number, args) in calls {
        // SAFETY: the arguments are plain numbers or null pointers, which these calls check before use.
        let result = unsafe { libc::syscall(number, args[0], args[1], args[2], 0usize, 0usize) };
        let errno = if result < 0 { std::io::Error::last_os_error().raw_os_error().unwrap_or(0) } else { 0 };
        println!("{name} {errno}");
    }
}
