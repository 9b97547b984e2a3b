//! The signals of `serve`. None but SIGKILL loses a call.

use std::{io, process};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::telemetry;

/// Handles signals from now on.
pub fn handle(stop: &CancellationToken) -> io::Result<()> {
    ignore_others()?;
    tokio::spawn(stop_on_signal(stop.clone())?);
    Ok(())
}

/// Logs the signals that mean nothing to Postern, and goes on. By default they would end the process, and daemons often
/// get them: SIGHUP from whoever expects them to read their configuration again.
fn ignore_others() -> io::Result<()> {
    let kinds = [
        ("SIGHUP", SignalKind::hangup()),
        ("SIGUSR1", SignalKind::user_defined1()),
        ("SIGUSR2", SignalKind::user_defined2()),
        ("SIGALRM", SignalKind::alarm()),
        ("SIGIO", SignalKind::io()),
    ];
    for (name, kind) in kinds {
        let mut signals = signal(kind)?;
        tokio::spawn(async move {
            while signals.recv().await.is_some() {
                tracing::info!(signal = name, "a signal was ignored: settings are read at the start only");
            }
        });
    }
    Ok(())
}

/// Stops on SIGINT, SIGTERM or SIGQUIT. A second signal exits at once, without waiting for calls to finish.
fn stop_on_signal(stop: CancellationToken) -> io::Result<impl Future<Output = ()>> {
    let mut signals = Stopping {
        interrupt: signal(SignalKind::interrupt())?,
        terminate: signal(SignalKind::terminate())?,
        quit: signal(SignalKind::quit())?,
    };
    Ok(async move {
        signals.recv().await;
        stop.cancel();
        signals.recv().await;
        tracing::warn!("second signal: stopping without waiting for calls");
        telemetry::flush_log();
        process::exit(1);
    })
}

struct Stopping {
    interrupt: Signal,
    terminate: Signal,
    quit: Signal,
}

impl Stopping {
    async fn recv(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = self.quit.recv() => {}
        }
    }
}
