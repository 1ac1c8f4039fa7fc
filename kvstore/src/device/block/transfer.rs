//! One transfer that the kernel may do in pieces: how far it has come, and when to give up.
//!
//! A short result is followed by a request for the rest, from the last whole page on (O_DIRECT takes nothing else). Two results in
//! a row that bring no whole page mean that there is nothing more to be had: the file ends there.

use rustix::io::Errno;

use super::{IoFault, PAGE_BYTES};

/// Interruptions in a row after which the system is believed to mean it.
const INTERRUPTIONS_MAX: u32 = 64;

/// Progress of one read or write.
#[derive(Debug)]
pub(super) struct Transfer {
    bytes: u64,
    done_bytes: u64,
    stalls: u32,
    interruptions: u32,
}

/// What to do after a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Ask for what [`Transfer::rest`] says.
    Again,
    /// It is over.
    End(Result<(), IoFault>),
}

impl Transfer {
    pub(super) const fn new(bytes: u64) -> Self {
        Self { bytes, done_bytes: 0, stalls: 0, interruptions: 0 }
    }

    /// What is still to be done: bytes to skip, and bytes after those.
    pub(super) const fn rest(&self) -> (u64, u64) {
        (self.done_bytes, self.bytes - self.done_bytes)
    }

    /// Takes a result of the kernel: bytes done, or its error number.
    pub(super) fn advance(&mut self, result: Result<u64, i32>) -> Next {
        match result {
            Ok(bytes) if bytes >= self.bytes - self.done_bytes => Next::End(Ok(())),
            Ok(bytes) => {
                let progress = bytes - bytes % PAGE_BYTES;
                self.done_bytes += progress;
                self.stalls = if progress > 0 { 0 } else { self.stalls + 1 };
                if self.stalls < 2 { Next::Again } else { Next::End(Err(IoFault::Short)) }
            }
            Err(code) if [Errno::INTR, Errno::AGAIN].iter().any(|errno| errno.raw_os_error() == code) => {
                self.interruptions += 1;
                if self.interruptions < INTERRUPTIONS_MAX { Next::Again } else { Next::End(Err(IoFault::Os(code))) }
            }
            Err(code) => Next::End(Err(IoFault::Os(code))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_transfer_is_over_at_once() {
        assert_eq!(Transfer::new(3 * PAGE_BYTES).advance(Ok(3 * PAGE_BYTES)), Next::End(Ok(())));
        assert_eq!(Transfer::new(0).advance(Ok(0)), Next::End(Ok(())), "a flush moves no bytes");
    }

    #[test]
    fn a_short_transfer_goes_on_at_the_last_whole_page() {
        let mut transfer = Transfer::new(3 * PAGE_BYTES);
        assert_eq!(transfer.advance(Ok(PAGE_BYTES + 100)), Next::Again);
        assert_eq!(transfer.rest(), (PAGE_BYTES, 2 * PAGE_BYTES));
        assert_eq!(transfer.advance(Ok(2 * PAGE_BYTES)), Next::End(Ok(())));
    }

    #[test]
    fn the_end_of_a_file_is_a_fault_and_not_silence() {
        let mut transfer = Transfer::new(3 * PAGE_BYTES);
        assert_eq!(transfer.advance(Ok(2 * PAGE_BYTES)), Next::Again);
        assert_eq!(transfer.advance(Ok(100)), Next::Again);
        assert_eq!(transfer.advance(Ok(100)), Next::End(Err(IoFault::Short)));
    }

    #[test]
    fn interruptions_are_repeated_within_bounds_and_errors_are_not() {
        let mut transfer = Transfer::new(PAGE_BYTES);
        let again = Errno::AGAIN.raw_os_error();
        assert!((1..INTERRUPTIONS_MAX).all(|_| transfer.advance(Err(again)) == Next::Again));
        assert_eq!(transfer.advance(Err(again)), Next::End(Err(IoFault::Os(again))));
        assert_eq!(Transfer::new(PAGE_BYTES).advance(Err(5)), Next::End(Err(IoFault::Os(5))));
    }
}
