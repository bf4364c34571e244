//! What must hold of every input: the program, tiny_http and the second reading agree on what was asked and on
//! where it ends.

use super::inside::{self, Admitted, Length};
use super::reference::{self, Reading};
use super::tiny::{Seen, Tiny};
use std::io::{self, ErrorKind, Read};

/// Reads the first head of what a connection brings, as `inside::head` does.
pub type Gate = dyn Fn(&[u8]) -> Result<Option<(Admitted, usize)>, u16>;

/// How often each thing was compared, so that a run can show that it was no idle one.
#[derive(Debug, Default)]
pub struct Tally {
    pub admitted: usize,
    pub refused: usize,
    pub short: usize,
    pub whole: usize,
    pub broken: usize,
    /// Of whole requests, those that tiny_http was also given as the client sent them.
    pub raw: usize,
}

/// Reads `bytes` as one connection brings them, in pieces that end at every `step`; the error says what differs.
pub fn connection(
    gate: &Gate,
    tiny: &Tiny,
    bytes: &[u8],
    step: usize,
    tally: &mut Tally,
) -> Result<(), String> {
    let mut rest = bytes;
    while !rest.is_empty() {
        let Some((admitted, head)) = same_head(gate, rest, step, tally)? else {
            break;
        };
        let mut own = head.fields.clone();
        own.iter_mut()
            .for_each(|(name, _)| name.make_ascii_lowercase());
        if sorted(&admitted.kept) != sorted(&own) {
            return Err(format!("the gate keeps {:?}, not {own:?}", admitted.kept));
        }
        let Some(body) = same_body(admitted.length, &rest[head.end..], step, tally)? else {
            break;
        };
        let end = head.end + body.end;
        same_raw(tiny, &head, &body, &rest[..end], tally)?;
        rest = &rest[end..];
    }
    Ok(())
}

fn same_head(
    gate: &Gate,
    bytes: &[u8],
    step: usize,
    tally: &mut Tally,
) -> Result<Option<(Admitted, reference::Head)>, String> {
    // As it comes: nothing is taken for a head that is not whole, nor refused that would be one.
    let whole = gate(bytes);
    let end = whole.as_ref().map_or(bytes.len(), |head| {
        head.as_ref().map_or(bytes.len(), |(_, end)| *end)
    });
    for cut in (0..end).step_by(step.max(end / 64)) {
        match gate(&bytes[..cut]) {
            Ok(None) => {}
            Err(_) if whole.is_err() => break,
            Err(status) => return Err(format!("{status} at {cut}, but the head is fine")),
            Ok(Some(_)) => return Err(format!("a head at {cut}, but it ends at {end}")),
        }
    }
    match (whole, reference::head(bytes)) {
        (Ok(Some((admitted, end))), Reading::Whole(head)) => {
            let asked = (&admitted.method, &admitted.target, admitted.length, end);
            let should = (&head.method, &head.target, head.length, head.end);
            if asked != should {
                return Err(format!("the gate reads {asked:?}, and should {should:?}"));
            }
            let close = |value: &str| {
                let mut items = value.split(',');
                items.any(|item| item.trim().eq_ignore_ascii_case("close"))
            };
            if admitted.close != (head.old || head.all("connection").any(close)) {
                return Err(format!("the gate reads close = {}", admitted.close));
            }
            tally.admitted += 1;
            Ok(Some((admitted, head)))
        }
        (Err(400 | 431), Reading::Refused) => {
            tally.refused += 1;
            Ok(None)
        }
        // What is not whole may be refused now or later.
        (Ok(None), Reading::Short | Reading::Refused) | (Err(400 | 431), Reading::Short) => {
            tally.short += 1;
            Ok(None)
        }
        (gate, should) => Err(format!(
            "the gate answers {:?} to this head, and should be {should:?}",
            gate.map(|head| head.map(|(_, end)| end))
        )),
    }
}

pub fn same_body(
    length: Length,
    bytes: &[u8],
    step: usize,
    tally: &mut Tally,
) -> Result<Option<reference::Body>, String> {
    let mut source = Pieces { bytes, at: 0, step };
    let room = [1, 7, 100, 16 << 10][bytes.len() % 4];
    let read = inside::body(length, &mut source, room);
    match (read, reference::body(length, bytes)) {
        (Ok(content), Reading::Whole(body)) => {
            if (&content, source.at) != (&body.content, body.end) {
                return Err(format!(
                    "the body is read as {} bytes that end at {}, and should be {} that end at {}",
                    content.len(),
                    source.at,
                    body.content.len(),
                    body.end
                ));
            }
            tally.whole += 1;
            Ok(Some(body))
        }
        (Err(e), Reading::Refused) if e.kind() == ErrorKind::InvalidData => {
            tally.broken += 1;
            Ok(None)
        }
        // A line that is cut short may be refused as one that is wrong: there is nobody to hear it.
        (Err(_), Reading::Short) => {
            tally.short += 1;
            Ok(None)
        }
        (read, should) => Err(format!(
            "the body is read as {read:?}, and should be {should:?}"
        )),
    }
}

/// What the client sent tiny_http would read the same way, if it met it: so there is one reading only of what
/// the gate lets through. Left out is what tiny_http cannot be asked.
fn same_raw(
    tiny: &Tiny,
    head: &reference::Head,
    body: &reference::Body,
    request: &[u8],
    tally: &mut Tally,
) -> Result<(), String> {
    let connection = head.all("connection").next().map(str::to_ascii_lowercase);
    let connection = connection.as_deref().unwrap_or_default();
    let mut expected = head.all("expect");
    let refuses = expected.any(|value| !value.eq_ignore_ascii_case("100-continue"));
    // It takes all that follows an upgrade, has no trailers, and allocates any length that it is told.
    let huge = request[..head.end]
        .split(|b| !b.is_ascii_digit())
        .any(|digits| digits.len() > 6);
    if refuses || connection.contains("upgrade") || body.trailers > 0 || huge {
        return Ok(());
    }
    let last = connection.contains("close") || head.old && !connection.contains("keep-alive");
    let begins = if request.starts_with(b"\r\n") { 2 } else { 0 };
    let should = Seen {
        method: head.method.clone(),
        target: head.target.clone(),
        fields: head.fields.clone(),
        body: body.content.clone(),
    };
    let seen = tiny.read_whole(&request[begins..], last);
    let seen = seen.map_err(|why| format!("as the client sent it: {why}"))?;
    tally.raw += 1;
    match seen == should {
        true => Ok(()),
        false => Err(format!("tiny_http reads {seen:?}, the gate {should:?}")),
    }
}

/// By name; those of one name stay in their order.
fn sorted(fields: &[(String, String)]) -> Vec<(String, String)> {
    let mut fields = fields.to_vec();
    fields.sort_by(|(a, _), (b, _)| a.cmp(b));
    fields
}

/// Bytes that come a few at a time.
struct Pieces<'a> {
    bytes: &'a [u8],
    at: usize,
    step: usize,
}

impl Read for Pieces<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let end = self.bytes.len().min(self.at + self.step);
        let count = (&self.bytes[self.at..end]).read(out)?;
        self.at += count;
        Ok(count)
    }
}
