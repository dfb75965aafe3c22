//! Helper programs (`ip`, `ethtool`) with limits on their run time and output.

use std::io::{self, Read};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// Maximum number of bytes that a helper may print, on stdout and on stderr each.
pub const MAX_OUTPUT: u64 = 16 << 20;
/// Time for a killed helper to end.
const KILL_WAIT: Duration = Duration::from_secs(1);
/// Pause between two checks whether it has ended.
const POLL_INTERVAL: Duration = Duration::from_millis(2);

/// Runs `command` to its end and returns what it printed; stdin is empty.
///
/// # Errors
/// If it cannot be started; `TimedOut` if it runs longer than `limit`, and `FileTooLarge` if it prints
/// more than [`MAX_OUTPUT`]. In both cases it is killed.
pub fn output(command: &mut Command, limit: Duration) -> io::Result<Output> {
    let deadline = Instant::now() + limit;
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn()?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    // A read ends when the child and everything that it started have closed their end. Reader threads
    // that are still waiting at the deadline are abandoned.
    let (sender, texts) = crossbeam_channel::bounded(2);
    read_in_background(0, stdout, sender.clone())?;
    read_in_background(1, stderr, sender)?;
    let mut output = [Vec::new(), Vec::new()];
    for _ in 0..output.len() {
        match texts.recv_deadline(deadline) {
            Ok((stream, Ok(text))) => output[stream] = text,
            Ok((_, Err(error))) => return Err(killed(child, error)),
            Err(_) => return Err(killed(child, io::ErrorKind::TimedOut.into())),
        }
    }
    let status = match wait(&mut child, deadline) {
        Ok(status) => status,
        Err(error) => return Err(killed(child, error)),
    };
    let [stdout, stderr] = output;
    Ok(Output {
        status,
        stdout,
        stderr,
    })
}

type Text = (usize, io::Result<Vec<u8>>);

fn read_in_background(
    stream: usize,
    from: Option<impl Read + Send + 'static>,
    to: crossbeam_channel::Sender<Text>,
) -> io::Result<()> {
    let Some(from) = from else {
        return Ok(());
    };
    thread::Builder::new()
        .name("output".to_owned())
        .spawn(move || {
            let mut text = Vec::new();
            let read = from.take(MAX_OUTPUT + 1).read_to_end(&mut text);
            let result = match read {
                Ok(read) if read as u64 > MAX_OUTPUT => Err(io::Error::new(
                    io::ErrorKind::FileTooLarge,
                    format!("it printed more than {MAX_OUTPUT} bytes"),
                )),
                Ok(_) => Ok(text),
                Err(error) => Err(error),
            };
            // After the deadline, nothing receives it.
            let _ = to.send((stream, result));
        })?;
    Ok(())
}

/// Waits until `child` ends.
///
/// # Errors
/// `TimedOut` if it still runs at the deadline.
pub fn wait(child: &mut Child, deadline: Instant) -> io::Result<ExitStatus> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if Instant::now() >= deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
        thread::sleep(POLL_INTERVAL);
    }
}

/// Kills it, and does not wait for long either: SIGKILL does not end what waits inside the kernel, for a
/// driver that hangs or for the network's lock.
fn killed(mut child: Child, error: io::Error) -> io::Error {
    // Fails only if it has already ended.
    let _ = child.kill();
    if wait(&mut child, Instant::now() + KILL_WAIT).is_err() {
        // Without the thread it stays a zombie, which is harmless.
        let reaper = thread::Builder::new().name("reaper".to_owned());
        let _ = reaper.spawn(move || child.wait());
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, limit: Duration) -> io::Result<Output> {
        output(Command::new("sh").args(["-c", script]), limit)
    }

    #[test]
    fn both_streams_and_the_status_come_back() {
        let output = shell("echo out; echo err >&2; exit 3", Duration::from_secs(60)).unwrap();
        assert_eq!(
            (&output.stdout[..], &output.stderr[..]),
            (&b"out\n"[..], &b"err\n"[..])
        );
        assert_eq!(output.status.code(), Some(3));
    }

    #[test]
    fn waiting_ends_at_the_deadline() {
        let mut child = Command::new("sh")
            .args(["-c", "exec sleep 600"])
            .spawn()
            .unwrap();
        let error = wait(&mut child, Instant::now() + Duration::from_millis(50)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        child.kill().unwrap();
        let status = wait(&mut child, Instant::now() + Duration::from_secs(60)).unwrap();
        assert!(!status.success());
    }

    #[test]
    fn one_that_hangs_or_never_stops_is_ended() {
        let error = shell("exec sleep 600", Duration::from_millis(50)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        // A process that inherited its output does not prolong the wait.
        let error = shell("sleep 5 & exit 0", Duration::from_millis(50)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        let error = shell("exec cat /dev/zero", Duration::from_secs(60)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
    }
}
