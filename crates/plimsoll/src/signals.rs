//! Signals that ask for the end, as something poll(2) can wait for.
use plimsoll_linux::explain;
use std::os::unix::net::UnixStream;

/// Readable once a signal has asked for the end.
pub(crate) fn signals() -> Result<UnixStream, String> {
    let (ours, theirs) = UnixStream::pair().map_err(|error| explain(&error))?;
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM, signal_hook::consts::SIGHUP] {
        let end = theirs.try_clone().map_err(|error| explain(&error))?;
        signal_hook::low_level::pipe::register(signal, end).map_err(|error| explain(&error))?;
    }
    Ok(ours)
}
