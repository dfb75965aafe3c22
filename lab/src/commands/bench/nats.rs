//! nats-server as a peer: a server on the testbed's links, and a minimal load generator for the NATS
//! client protocol (<https://docs.nats.io/reference/reference-protocols/nats-protocol>).
//!
//! The generator publishes over one connection, as fast as the server takes it, the same bytes again
//! and again. Nobody subscribes: the server parses each message and drops it. It answers a PING once
//! it has taken everything before it.

use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use penstock_process::text::escape;

use penstock_process::interrupt::Interrupt;
use penstock_testbed::command;
use penstock_testbed::netns::{self, Net, enter};
use penstock_testbed::running::{Running, inside};

const PROGRAM: &str = "nats-server";
const PORT: u16 = 4222;
/// What the server logs once it accepts connections.
const READY: &str = "Server is ready";
const READY_LIMIT: Duration = Duration::from_secs(10);
/// Longest wait for the server to read or to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// Bytes of one write.
const WRITE: usize = 64 << 10;
/// Longest line that the server may send: its INFO has some hundred bytes.
const MAX_LINE: u64 = 64 << 10;
const SUBJECT: &str = "penstock.bench";

/// The installed version, or how to install it.
pub fn version() -> Result<String> {
    let text = command::run(&[PROGRAM, "--version"])?;
    Ok(escape(text.trim()).into_owned())
}

/// One run; payload MB/s (10^6 bytes) that the server took.
pub fn measure(
    net: &Net,
    bytes: u64,
    message_size: usize,
    folder: &Path,
    interrupt: &Interrupt,
) -> Result<f64> {
    let address = netns::broker_address(0);
    let mut command = inside(net.broker(0), Path::new(PROGRAM));
    command
        .args(["-a", &address.to_string(), "-p", &PORT.to_string()])
        .stdin(Stdio::null());
    let log = folder.join("nats-server.log");
    let mut server = Running::start(PROGRAM, &mut command, None, &log)?;
    server.wait_for_line(READY, READY_LIMIT, interrupt)?;
    thread::scope(|scope| {
        let generator = scope.spawn(|| {
            enter(net.publisher())?;
            publish(connect(address)?, bytes, message_size, interrupt)
        });
        generator
            .join()
            .map_err(|_| anyhow!("the load generator panicked"))?
    })
    .map_err(
        |error| match error.is::<penstock_process::interrupt::Interrupted>() {
            true => error,
            false => error.context(server.failure("did not take all messages").to_string()),
        },
    )
}

fn connect(address: Ipv4Addr) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&SocketAddr::from((address, PORT)), ANSWER_LIMIT)
        .context("cannot connect to nats-server")?;
    stream.set_read_timeout(Some(ANSWER_LIMIT))?;
    stream.set_write_timeout(Some(ANSWER_LIMIT))?;
    Ok(stream)
}

/// Publishes at least `bytes` of payload; MB/s from the first message to the server's last PONG.
fn publish(
    stream: TcpStream,
    bytes: u64,
    message_size: usize,
    interrupt: &Interrupt,
) -> Result<f64> {
    let mut answers = BufReader::new(stream.try_clone()?);
    let mut server = stream;
    let info = line(&mut answers)?;
    ensure!(
        info.starts_with("INFO "),
        "nats-server greets with {info:?} instead of INFO"
    );
    server.write_all(
        b"CONNECT {\"verbose\":false,\"pedantic\":false,\"lang\":\"rust\",\"version\":\"1\",\"name\":\"penstock-lab\"}\r\n",
    )?;
    until_pong(&mut server, &mut answers)?;
    let one = message(message_size);
    let per_write = (WRITE / one.len()).max(1);
    let write = one.repeat(per_write);
    let mut left = bytes.div_ceil(message_size as u64).max(1);
    let payload = left * message_size as u64;
    let started = Instant::now();
    while left > 0 {
        interrupt.check()?;
        let messages = left.min(per_write as u64);
        let part = &write[..messages as usize * one.len()];
        if let Err(error) = server.write_all(part) {
            // It says why before it closes the connection.
            until_pong(&mut server, &mut answers)?;
            return Err(error).context("cannot write to nats-server");
        }
        left -= messages;
    }
    until_pong(&mut server, &mut answers)?;
    Ok(payload as f64 / started.elapsed().as_secs_f64() / 1e6)
}

/// `PUB` with its payload.
fn message(size: usize) -> Vec<u8> {
    let mut message = format!("PUB {SUBJECT} {size}\r\n").into_bytes();
    message.extend((0..size).map(|at| b'a' + (at % 26) as u8));
    message.extend(b"\r\n");
    message
}

/// Asks whether all was taken, and waits until it was.
fn until_pong(server: &mut impl Write, answers: &mut impl BufRead) -> Result<()> {
    let asked = server.write_all(b"PING\r\n");
    loop {
        let answer = line(answers)?;
        match answer.split(' ').next().unwrap_or_default() {
            "PONG" => return asked.context("cannot write to nats-server"),
            "PING" => server.write_all(b"PONG\r\n")?,
            "+OK" | "INFO" => {}
            "-ERR" => bail!("nats-server refuses: {answer}"),
            _ => bail!("nats-server sends {answer:?}"),
        }
    }
}

/// The next line, without its end and safe to show.
fn line(answers: &mut impl BufRead) -> Result<String> {
    let mut bytes = Vec::new();
    let read = answers.take(MAX_LINE).read_until(b'\n', &mut bytes);
    match read {
        Ok(0) => bail!("nats-server closed the connection"),
        Ok(_) if bytes.last() != Some(&b'\n') => {
            bail!("nats-server sends a line of more than {MAX_LINE} bytes, or half of one")
        }
        Ok(_) => Ok(escape(String::from_utf8_lossy(&bytes).trim_end()).into_owned()),
        Err(error) if is_timeout(&error) => {
            bail!("nats-server does not answer within {ANSWER_LIMIT:?}")
        }
        Err(error) => Err(error).context("cannot read from nats-server"),
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    /// What a fake server does with a connection; it returns the payload that it took.
    fn against(
        serve: impl FnOnce(TcpStream) -> io::Result<u64> + Send,
        bytes: u64,
        size: usize,
    ) -> (Result<f64>, u64) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::scope(|scope| {
            let server = scope.spawn(|| serve(listener.accept().unwrap().0));
            let client = TcpStream::connect(address).unwrap();
            let outcome = publish(client, bytes, size, &Interrupt::default());
            (outcome, server.join().unwrap().unwrap_or(0))
        })
    }

    /// A server that parses as the protocol says; it asks back once before its second PONG.
    fn parse(stream: TcpStream) -> io::Result<u64> {
        let mut out = stream.try_clone()?;
        let mut input = BufReader::new(stream);
        out.write_all(b"INFO {\"server_id\":\"x\",\"max_payload\":1048576}\r\n")?;
        let (mut taken, mut pings) = (0, 0);
        let mut text = String::new();
        loop {
            text.clear();
            if input.read_line(&mut text)? == 0 {
                return Ok(taken);
            }
            let words: Vec<&str> = text.split_whitespace().collect();
            match words[0] {
                "CONNECT" => assert!(serde_json::from_str::<serde_json::Value>(words[1]).is_ok()),
                "PING" if pings == 1 => {
                    out.write_all(b"PING\r\nPONG\r\n")?;
                }
                "PING" => {
                    pings += 1;
                    out.write_all(b"+OK\r\nPONG\r\n")?;
                }
                "PONG" => {}
                "PUB" => {
                    assert_eq!(words[1], SUBJECT);
                    let size: usize = words[2].parse().unwrap();
                    let mut payload = vec![0; size + 2];
                    input.read_exact(&mut payload)?;
                    assert_eq!(&payload[size..], b"\r\n");
                    taken += size as u64;
                }
                other => panic!("{other}"),
            }
        }
    }

    #[test]
    fn all_messages_arrive_whole() {
        for (bytes, size, wanted) in [
            (300_000, 1024, 300_032),
            (1, 64, 64),
            (999, 100_000, 100_000),
        ] {
            let (outcome, taken) = against(parse, bytes, size);
            assert!(outcome.unwrap() > 0.0);
            assert_eq!(taken, wanted);
        }
    }

    #[test]
    fn a_server_that_refuses_or_goes_is_reported() {
        let refuse = |mut stream: TcpStream| {
            stream.write_all(b"INFO {}\r\n-ERR 'Authorization Violation\x1b[2J'\r\n")?;
            let mut rest = Vec::new();
            stream.shutdown(std::net::Shutdown::Write)?;
            stream.read_to_end(&mut rest).map(|_| 0)
        };
        let error = against(refuse, 10_000, 64).0.unwrap_err().to_string();
        assert!(error.contains("Authorization Violation"), "{error}");
        assert!(!error.contains('\x1b'), "{error}");
        let greet = |mut stream: TcpStream| stream.write_all(b"HTTP/1.1 400\r\n").map(|()| 0);
        let error = against(greet, 1, 64).0.unwrap_err().to_string();
        assert!(error.contains("instead of INFO"), "{error}");
        let silent = |stream: TcpStream| {
            drop(stream);
            Ok(0)
        };
        let error = against(silent, 1, 64).0.unwrap_err().to_string();
        assert!(error.contains("closed the connection"), "{error}");
    }

    #[test]
    fn a_line_without_end_is_refused() {
        let mut endless = BufReader::new(io::repeat(b'x'));
        let error = line(&mut endless).unwrap_err().to_string();
        assert!(error.contains("more than"), "{error}");
    }
}
