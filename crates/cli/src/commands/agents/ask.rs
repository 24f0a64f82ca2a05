//! Asks a server how large its context is.

use super::{CONTEXT, MOST, PATIENCE};
use crate::{Result, ui};
use serde_json::Value;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};

/// The context of the server that runs at an address, or one to begin with.
pub(super) fn context(url: &str, key: Option<&str>) -> u32 {
    ask(url, key).unwrap_or_else(|e| {
        let why = match e.downcast_ref::<io::Error>().map(io::Error::kind) {
            Some(ErrorKind::WouldBlock | ErrorKind::TimedOut) => "no answer in time".to_owned(),
            _ => e.to_string(),
        };
        ui::note(&format!(
            "{url} does not say how large its context is ({why}): taking {CONTEXT}, --ctx names another"
        ));
        CONTEXT
    })
}

pub(super) fn ask(url: &str, key: Option<&str>) -> Result<u32> {
    let place = url.strip_prefix("http://").ok_or("only http:// can be asked here")?;
    let (host, path) = place.split_at(place.find('/').unwrap_or(place.len()));
    let key = key.map(|key| format!("Authorization: Bearer {key}\r\n")).unwrap_or_default();
    let request = format!(
        "GET {path}/v1/models HTTP/1.1\r\nHost: {host}\r\nAccept: application/json\r\n{key}Connection: close\r\n\r\n"
    );
    let mut stream = connect(host)?;
    stream.write_all(request.as_bytes())?;
    let models: Value = serde_json::from_slice(&body(&mut BufReader::new(stream.take(MOST)))?)?;
    let context = models["data"][0]["max_model_len"].as_u64().and_then(|n| u32::try_from(n).ok());
    context.filter(|n| *n > 0).ok_or_else(|| "its list of models has no max_model_len".into())
}

fn connect(host: &str) -> Result<TcpStream> {
    let port = host.rsplit_once(':').map(|(_, port)| port).unwrap_or_default();
    let default = if port.parse::<u16>().is_ok() { "" } else { ":80" };
    let mut outcome = Err("it has no address".into());
    for address in format!("{host}{default}").to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, PATIENCE) {
            Ok(stream) => {
                stream.set_read_timeout(Some(PATIENCE))?;
                stream.set_write_timeout(Some(PATIENCE))?;
                return Ok(stream);
            }
            Err(e) => outcome = Err(e.into()),
        }
    }
    outcome
}

/// The body of an HTTP answer that says all is well.
fn body(reader: &mut impl BufRead) -> Result<Vec<u8>> {
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let status = match line.strip_prefix("HTTP/1.") {
        Some(rest) => rest.split_whitespace().nth(1).unwrap_or_default().to_owned(),
        None => return Err("that is no HTTP server".into()),
    };
    let (mut length, mut chunked) = (None, false);
    loop {
        line.clear();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.split_once(':') else { break };
        match (name.to_ascii_lowercase().as_str(), value.trim()) {
            ("content-length", value) => length = Some(value.parse::<u64>()?),
            ("transfer-encoding", value) => chunked = value.to_ascii_lowercase().ends_with("chunked"),
            _ => {}
        }
    }
    match (status.as_str(), length) {
        ("200", _) if chunked => chunks(reader),
        ("200", Some(length)) => exactly(reader, length),
        ("200", None) => {
            let mut all = Vec::new();
            reader.read_to_end(&mut all)?;
            Ok(all)
        }
        ("401", _) => Err("it wants a key: --key names it".into()),
        (status, _) => Err(format!("it answers with status {status}").into()),
    }
}

fn chunks(reader: &mut impl BufRead) -> Result<Vec<u8>> {
    let mut all = Vec::new();
    let mut line = String::new();
    loop {
        line.clear();
        reader.read_line(&mut line)?;
        let size = line.split(';').next().unwrap_or_default().trim();
        let size = u64::from_str_radix(size, 16).map_err(|_| "its answer is not whole")?;
        if size == 0 {
            return Ok(all);
        }
        all.append(&mut exactly(reader, size)?);
        reader.read_line(&mut line)?;
    }
}

fn exactly(reader: &mut impl BufRead, length: u64) -> Result<Vec<u8>> {
    let mut all = Vec::new();
    reader.by_ref().take(length).read_to_end(&mut all)?;
    if all.len() as u64 == length { Ok(all) } else { Err("its answer is not whole".into()) }
}
