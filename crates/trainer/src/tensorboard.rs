//! Event files that TensorBoard reads.
//!
//! A file is a sequence of records: length (u64), masked CRC-32C of the length, payload, masked CRC-32C of the payload,
//! all little-endian. A payload is one `tensorflow.Event` in protocol buffer encoding, of which a scalar needs few
//! fields. They are written by hand because no crate for them is maintained.
//!
//! | message | field | number | wire type |
//! | --- | --- | --- | --- |
//! | Event | wall_time (seconds) | 1 | 64 bit |
//! | Event | step | 2 | varint |
//! | Event | file_version | 3 | bytes |
//! | Event | summary | 5 | message |
//! | Event | session_log | 7 | message |
//! | Summary | value (repeated) | 1 | message |
//! | Summary.Value | tag | 1 | bytes |
//! | Summary.Value | simple_value | 2 | 32 bit |
//! | SessionLog | status (START = 1) | 1 | varint |

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::error::Problem;
use crate::metrics::Line;

/// An open event file.
#[derive(Debug)]
pub struct EventWriter {
    path: PathBuf,
    file: BufWriter<File>,
}

impl EventWriter {
    /// Creates a new event file in `folder`. With `resumed_after`, TensorBoard hides what earlier files in the folder
    /// say about later steps, which the resumed run makes again.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn create(folder: &Path, resumed_after: Option<u64>) -> Result<Self, Problem> {
        let now = wall_time();
        let name = format!("events.out.tfevents.{}.lowrank.{}", now as u64, std::process::id());
        let path = folder.join(name);
        let file = std::fs::create_dir_all(folder)
            .and_then(|()| File::options().append(true).create(true).open(&path))
            .map_err(|error| cannot_write(&path, error))?;
        let mut writer = Self { path, file: BufWriter::new(file) };
        writer.append(&version_event(now))?;
        if let Some(step) = resumed_after {
            writer.append(&start_event(now, step + 1))?;
        }
        writer.flush()?;
        Ok(writer)
    }

    /// Writes the series of one line of the metrics; see [`Line::scalars`].
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&mut self, line: &Line) -> Result<(), Problem> {
        let scalars = line.scalars();
        if scalars.is_empty() {
            return Ok(());
        }
        self.append(&scalar_event(wall_time(), line.step(), &scalars))?;
        self.flush()
    }

    fn append(&mut self, payload: &[u8]) -> Result<(), Problem> {
        self.file.write_all(&record(payload)).map_err(|error| cannot_write(&self.path, error))
    }

    fn flush(&mut self) -> Result<(), Problem> {
        self.file.flush().map_err(|error| cannot_write(&self.path, error))
    }
}

fn cannot_write(path: &Path, error: std::io::Error) -> Problem {
    Problem::run(format!("cannot write the event file {}", path.display()))
        .source(error)
        .hint("is the disk full? --set logging.tensorboard=false runs without event files")
}

/// Seconds since 1970.
fn wall_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |elapsed| elapsed.as_secs_f64())
}

fn version_event(wall_time: f64) -> Vec<u8> {
    let mut event = Vec::new();
    put_f64(&mut event, 1, wall_time);
    put_bytes(&mut event, 3, b"brain.Event:2");
    event
}

/// Says that a session starts at `step`: everything from that step on in earlier files is void.
fn start_event(wall_time: f64, step: u64) -> Vec<u8> {
    let mut session_log = Vec::new();
    put_varint_field(&mut session_log, 1, 1);
    let mut event = Vec::new();
    put_f64(&mut event, 1, wall_time);
    put_varint_field(&mut event, 2, step);
    put_bytes(&mut event, 7, &session_log);
    event
}

fn scalar_event(wall_time: f64, step: u64, scalars: &[(String, f64)]) -> Vec<u8> {
    let mut summary = Vec::new();
    for (tag, number) in scalars {
        let mut value = Vec::new();
        put_bytes(&mut value, 1, tag.as_bytes());
        put_f32(&mut value, 2, *number as f32);
        put_bytes(&mut summary, 1, &value);
    }
    let mut event = Vec::new();
    put_f64(&mut event, 1, wall_time);
    put_varint_field(&mut event, 2, step);
    put_bytes(&mut event, 5, &summary);
    event
}

// The low three bits of a field's key are its wire type: 0 varint, 1 64 bit, 2 bytes with a length, 5 32 bit.

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push((value as u8 & 0x7f) | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn put_varint_field(out: &mut Vec<u8>, field: u64, value: u64) {
    put_varint(out, field << 3);
    put_varint(out, value);
}

fn put_f64(out: &mut Vec<u8>, field: u64, value: f64) {
    put_varint(out, field << 3 | 1);
    out.extend(value.to_le_bytes());
}

fn put_f32(out: &mut Vec<u8>, field: u64, value: f32) {
    put_varint(out, field << 3 | 5);
    out.extend(value.to_le_bytes());
}

fn put_bytes(out: &mut Vec<u8>, field: u64, bytes: &[u8]) {
    put_varint(out, field << 3 | 2);
    put_varint(out, bytes.len() as u64);
    out.extend(bytes);
}

/// One record around a payload.
fn record(payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u64).to_le_bytes();
    let mut bytes = Vec::with_capacity(payload.len() + 16);
    bytes.extend(length);
    bytes.extend(masked_crc(&length).to_le_bytes());
    bytes.extend(payload);
    bytes.extend(masked_crc(payload).to_le_bytes());
    bytes
}

/// A checksum that does not become trivial when the data holds checksums: rotated right by 15 bits, plus a constant.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli, reflected polynomial 0x82f63b78). Bit by bit: an event has a few hundred bytes.
fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            let low_bit = crc & 1;
            crc = (crc >> 1) ^ (0x82f6_3b78 * low_bit);
        }
    }
    !crc
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;
    use crate::metrics::EvalLine;

    #[test]
    fn checksums_of_rfc_3720() {
        assert_eq!(crc32c(b""), 0);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(&(0..32).collect::<Vec<u8>>()), 0x46dd_794e);
        assert_eq!(crc32c(&(0..32).rev().collect::<Vec<u8>>()), 0x113f_db5c);
    }

    #[test]
    fn the_version_record_byte_by_byte() {
        let bytes = record(&version_event(1.5));
        let expected = [
            &[24, 0, 0, 0, 0, 0, 0, 0][..],
            &masked_crc(&24u64.to_le_bytes()).to_le_bytes(),
            &[0x09, 0, 0, 0, 0, 0, 0, 0xf8, 0x3f, 0x1a, 13],
            b"brain.Event:2",
            &masked_crc(&version_event(1.5)).to_le_bytes(),
        ]
        .concat();
        assert_eq!(bytes, expected);
        // The checksum of a length of 24 as every event file of TensorFlow has it at its start.
        assert_eq!(&bytes[8..12], &[0xa3, 0x7f, 0x4b, 0x22]);
    }

    /// A field of a message: its number, and its value as a number's bits or as bytes.
    #[derive(Debug, PartialEq)]
    enum Field {
        Number(u64, u64),
        Bytes(u64, Vec<u8>),
    }

    fn take_varint(bytes: &mut &[u8]) -> u64 {
        let (mut value, mut shift) = (0, 0);
        loop {
            let byte = bytes[0];
            *bytes = &bytes[1..];
            value |= u64::from(byte & 0x7f) << shift;
            shift += 7;
            if byte < 0x80 {
                return value;
            }
        }
    }

    fn take<'a>(bytes: &mut &'a [u8], count: usize) -> &'a [u8] {
        let (head, tail) = bytes.split_at(count);
        *bytes = tail;
        head
    }

    fn decode(mut bytes: &[u8]) -> Vec<Field> {
        let mut fields = Vec::new();
        while !bytes.is_empty() {
            let key = take_varint(&mut bytes);
            fields.push(match key & 7 {
                0 => Field::Number(key >> 3, take_varint(&mut bytes)),
                1 => Field::Number(key >> 3, u64::from_le_bytes(take(&mut bytes, 8).try_into().unwrap())),
                2 => {
                    let length = take_varint(&mut bytes) as usize;
                    Field::Bytes(key >> 3, take(&mut bytes, length).to_vec())
                }
                5 => {
                    let bits = u32::from_le_bytes(take(&mut bytes, 4).try_into().unwrap());
                    Field::Number(key >> 3, bits.into())
                }
                wire_type => panic!("wire type {wire_type}"),
            });
        }
        fields
    }

    /// The payloads of a file, each with its checksums verified.
    fn payloads(mut bytes: &[u8]) -> Vec<Vec<u8>> {
        let mut found = Vec::new();
        while !bytes.is_empty() {
            let length = take(&mut bytes, 8);
            assert_eq!(take(&mut bytes, 4), masked_crc(length).to_le_bytes());
            let payload = take(&mut bytes, u64::from_le_bytes(length.try_into().unwrap()) as usize);
            assert_eq!(take(&mut bytes, 4), masked_crc(payload).to_le_bytes());
            found.push(payload.to_vec());
        }
        found
    }

    #[test]
    fn what_was_written_is_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(&folder.path().join("tensorboard"), Some(299)).unwrap();
        let line = EvalLine {
            step: 300,
            loss: 0.75,
            perplexity: Some(2.117),
            tokens: 9,
            exact_match: Some(0.5),
            exact_match_samples: Some(4),
            scores: [("accuracy".to_owned(), 0.25)].into(),
            seconds: 1.0,
        };
        writer.write(&Line::Eval(line)).unwrap();
        let name = writer.path.file_name().unwrap().to_str().unwrap().to_owned();
        assert!(name.starts_with("events.out.tfevents."), "{name}");

        let payloads = payloads(&std::fs::read(&writer.path).unwrap());
        let events: Vec<Vec<Field>> = payloads.iter().map(|payload| decode(payload)).collect();
        assert_eq!(events.len(), 3);
        assert_eq!(events[0][1], Field::Bytes(3, b"brain.Event:2".to_vec()));
        assert_eq!(events[1][1..], [Field::Number(2, 300), Field::Bytes(7, vec![8, 1])]);
        let Field::Number(1, time) = events[2][0] else { panic!("no wall time") };
        assert!(f64::from_bits(time) > 1.7e9);
        assert_eq!(events[2][1], Field::Number(2, 300));
        let Field::Bytes(5, summary) = &events[2][2] else { panic!("no summary") };
        let values: Vec<(String, f32)> = decode(summary)
            .into_iter()
            .map(|value| {
                let Field::Bytes(1, value) = value else { panic!("no value") };
                let fields = decode(&value);
                let [Field::Bytes(1, tag), Field::Number(2, bits)] = &fields[..] else { panic!("{fields:?}") };
                (String::from_utf8(tag.clone()).unwrap(), f32::from_bits(*bits as u32))
            })
            .collect();
        let expected = [
            ("eval/loss".to_owned(), 0.75),
            ("eval/perplexity".to_owned(), 2.117),
            ("eval/exact_match".to_owned(), 0.5),
            ("eval/accuracy".to_owned(), 0.25),
        ];
        assert_eq!(values, expected);
    }
}
