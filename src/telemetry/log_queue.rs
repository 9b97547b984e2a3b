//! Log lines on their way to standard error. A server writes a line for each call, and whoever reads standard error may
//! stop reading: lines then wait in a bounded queue, and no call waits with them. Those that find it full are dropped
//! and counted.
//!
//! `tracing-appender` has such a queue too. It prints to standard output when the queue is full at the end, and panics
//! if that is closed.

use std::{io, sync::OnceLock, thread, time::Duration};

/// How many lines wait. A line has some hundred bytes.
const MOST_WAITING: usize = 4_096;
/// How many bytes are written at once, apart from the last line of them.
const MOST_AT_ONCE: usize = 32 * 1024;
/// How long the last lines may take when the process ends.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

enum Entry {
    Line(Vec<u8>),
    /// Answered when everything before it is written.
    Flush(flume::Sender<()>),
}

/// The end of the queue to which the log is written.
#[derive(Clone)]
pub(super) struct LogQueue(flume::Sender<Entry>);

/// The queue of this process, which has one standard error.
static QUEUE: OnceLock<flume::Sender<Entry>> = OnceLock::new();

/// Waits, not for long, until the lines before are written.
pub fn flush() {
    let Some(queue) = QUEUE.get() else {
        return;
    };
    let (written, is_written) = flume::bounded(1);
    if queue.send_timeout(Entry::Flush(written), FLUSH_TIMEOUT).is_ok() {
        // Nobody can be told that the lines were not written.
        let _ = is_written.recv_timeout(FLUSH_TIMEOUT);
    }
}

/// Writes the lines that still wait when it is dropped.
#[must_use]
#[derive(Debug)]
pub struct LogGuard(());

impl LogQueue {
    /// Starts the thread that writes to standard error.
    pub(super) fn start() -> io::Result<(Self, LogGuard)> {
        let (sender, entries) = flume::bounded(MOST_WAITING);
        thread::Builder::new().name("log".to_owned()).spawn(move || write_all(&entries, &mut io::stderr()))?;
        let _ = QUEUE.set(sender.clone());
        Ok((Self(sender), LogGuard(())))
    }
}

impl io::Write for LogQueue {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.0.try_send(Entry::Line(line.to_vec())).is_err() {
            metrics::counter!("postern_log_lines_dropped_total").increment(1);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for LogGuard {
    fn drop(&mut self) {
        flush();
    }
}

/// Writes what comes, several lines at once where they wait. Lines that cannot be written are lost.
fn write_all(entries: &flume::Receiver<Entry>, output: &mut impl io::Write) {
    let mut lines = Vec::new();
    while let Ok(first) = entries.recv() {
        let mut next = Some(first);
        let mut flushed = None;
        while let Some(entry) = next.take() {
            match entry {
                Entry::Line(line) => lines.extend_from_slice(&line),
                Entry::Flush(written) => flushed = Some(written),
            }
            if flushed.is_none() && lines.len() < MOST_AT_ONCE {
                next = entries.try_recv().ok();
            }
        }
        let _ = output.write_all(&lines);
        lines.clear();
        if let Some(written) = flushed {
            let _ = written.send(());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn lines_are_written_in_their_order_and_a_flush_comes_after_them() {
        let (sender, entries) = flume::bounded(MOST_WAITING);
        let mut queue = LogQueue(sender.clone());
        let expected: Vec<_> =
            (0..1_000).flat_map(|number| format!("line {number} {:80}\n", "").into_bytes()).collect();
        for line in expected.split_inclusive(|byte| *byte == b'\n') {
            queue.write_all(line).expect("it never fails");
        }
        let (written, is_written) = flume::bounded(1);
        sender.send(Entry::Flush(written)).expect("a place");
        drop((sender, queue));
        let mut output = Vec::new();
        write_all(&entries, &mut output);
        assert!(is_written.try_recv().is_ok());
        assert_eq!(output, expected);
    }

    #[test]
    fn a_line_that_finds_the_queue_full_is_dropped() {
        let (sender, entries) = flume::bounded(2);
        let mut queue = LogQueue(sender);
        for _ in 0..5 {
            queue.write_all(b"line\n").expect("it never fails");
        }
        assert_eq!(entries.len(), 2);
    }
}
