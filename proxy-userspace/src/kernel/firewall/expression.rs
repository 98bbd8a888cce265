//! Rules of nf_tables, as far as the questions about a chain need them.

use super::filter::Effect;
use crate::kernel::capability::netlink::{self, attributes, be32};

/// Bits of `ct state` (`NF_CT_STATE_BIT`).
pub const ESTABLISHED: u32 = 1 << 1;

/// As much of an expression as the questions need.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expression {
    /// Drops or rejects.
    Drop,
    Accept,
    /// Reads `ct status`.
    DnatStatus,
    /// Changes nothing: a counter, a log line.
    Neutral,
    /// Goes on with packets of these conntrack states only.
    States(u32),
    /// A verdict for each of these states.
    StateVerdicts(Vec<(u32, Verdict)>),
    /// Looks at the packet, and at most ends the rule.
    Match,
    Other,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Accept,
    Drop,
    Other,
}

/// The elements of an anonymous set: key, and verdict where it is a map.
pub type Elements = Vec<(u32, Option<Verdict>)>;

/// The expressions of a rule: NFTA_RULE_EXPRESSIONS { NFTA_LIST_ELEM { NFTA_EXPR_NAME, NFTA_EXPR_DATA } }. `set`: the elements of a
/// set by its name.
pub fn expressions(rule: &[u8], mut set: impl FnMut(&str) -> Option<Elements>) -> Vec<Expression> {
    let list = attribute(rule, 4).unwrap_or_default();
    let raw: Vec<(String, &[u8])> = attributes(list)
        .map(|(_, element)| (text(attribute(element, 1)), attribute(element, 2).unwrap_or_default()))
        .collect();
    let mut rest = &raw[..];
    let mut found = Vec::new();
    while let Some(((name, data), behind)) = rest.split_first() {
        let (expression, taken) = match state_test(name, data, behind, &mut set) {
            Some(tested) => tested,
            None => (classify(name, data), 0),
        };
        found.push(expression);
        rest = behind.get(taken..).unwrap_or_default();
    }
    found
}

/// What the whole rule does to a packet of an established connection.
pub fn effect(rule: &[Expression]) -> Effect {
    use Expression::{Accept, DnatStatus, Match, Neutral, StateVerdicts, States};
    let mut rule: Vec<_> = rule.iter().filter(|expression| **expression != Neutral).collect();
    let Some(last) = rule.pop() else { return Effect::Nothing };
    let only_looks = rule.iter().all(|expression| matches!(expression, Match | DnatStatus | States(_)));
    let only_states = rule.iter().all(|expression| matches!(expression, States(_)));
    let of_others = rule.iter().any(|expression| matches!(expression, States(states) if states & ESTABLISHED == 0));
    match last {
        Accept if rule.is_empty() => Effect::AcceptsAll,
        Accept if only_states && !of_others => Effect::AcceptsEstablished,
        Accept | Match | DnatStatus | States(_) if only_looks => Effect::Nothing,
        _ if of_others => Effect::OthersOnly,
        StateVerdicts(verdicts) => {
            let of_established = verdicts.iter().find(|(states, _)| states & ESTABLISHED != 0);
            match of_established.map(|(_, verdict)| *verdict) {
                Some(Verdict::Accept) if rule.is_empty() => Effect::AcceptsEstablishedOnly,
                None if only_looks => Effect::OthersOnly,
                Some(Verdict::Accept | Verdict::Drop | Verdict::Other) | None => Effect::Decides,
            }
        }
        Accept | Match | DnatStatus | States(_) | Expression::Drop | Neutral | Expression::Other => Effect::Decides,
    }
}

/// `ct state …`, which is several expressions, and how many of those behind the first.
fn state_test(
    name: &str,
    data: &[u8],
    behind: &[(String, &[u8])],
    set: &mut impl FnMut(&str) -> Option<Elements>,
) -> Option<(Expression, usize)> {
    const NFT_CT_STATE: u32 = 0;
    // NFTA_CT_DREG, NFTA_CT_KEY
    if name != "ct" || attribute(data, 1).is_none() || attribute(data, 2).and_then(be32) != Some(NFT_CT_STATE) {
        return None;
    }
    let named = |at: usize, wanted: &str| behind.get(at).filter(|(name, _)| name == wanted).map(|(_, data)| *data);
    if let (Some(bits), Some(compared)) = (named(0, "bitwise"), named(1, "cmp")) {
        // NFTA_BITWISE_MASK; NFTA_CMP_OP is NFT_CMP_NEQ, NFTA_CMP_DATA is 0
        let mask = attribute(bits, 4).and_then(value)?;
        let not_zero =
            attribute(compared, 2).and_then(be32) == Some(1) && attribute(compared, 3).and_then(value) == Some(0);
        return not_zero.then_some((Expression::States(mask), 2));
    }
    if let Some(compared) = named(0, "cmp") {
        let equal = attribute(compared, 2).and_then(be32) == Some(0);
        return equal.then_some((Expression::States(attribute(compared, 3).and_then(value)?), 1));
    }
    let lookup = named(0, "lookup")?;
    // NFTA_LOOKUP_FLAGS: not in the set.
    if attribute(lookup, 5).and_then(be32).unwrap_or(0) != 0 {
        return None;
    }
    let elements = set(&text(attribute(lookup, 1)))?;
    // NFTA_LOOKUP_DREG: a map.
    if attribute(lookup, 3).is_none() {
        return Some((Expression::States(elements.iter().fold(0, |all, (states, _)| all | states)), 1));
    }
    let verdicts: Option<Vec<_>> = elements.into_iter().map(|(states, verdict)| Some((states, verdict?))).collect();
    Some((Expression::StateVerdicts(verdicts?), 1))
}

fn classify(name: &str, data: &[u8]) -> Expression {
    const NFT_CT_STATUS: u32 = 2;
    match name {
        "counter" | "log" => Expression::Neutral,
        "reject" => Expression::Drop,
        // NFTA_CT_KEY
        "ct" if attribute(data, 2).and_then(be32) == Some(NFT_CT_STATUS) => Expression::DnatStatus,
        // NFTA_META_SREG, _CT_SREG, _PAYLOAD_SREG, _EXTHDR_SREG: it writes.
        "meta" if attribute(data, 3).is_none() => Expression::Match,
        "ct" if attribute(data, 4).is_none() => Expression::Match,
        "payload" if attribute(data, 5).is_none() => Expression::Match,
        "exthdr" if attribute(data, 7).is_none() => Expression::Match,
        // NFTA_LOOKUP_DREG: a map, of verdicts perhaps.
        "lookup" if attribute(data, 3).is_none() => Expression::Match,
        "cmp" | "bitwise" | "byteorder" | "range" | "fib" | "rt" | "socket" => Expression::Match,
        // NFTA_IMMEDIATE_DATA
        "immediate" => match attribute(data, 2).and_then(verdict) {
            Some(Verdict::Accept) => Expression::Accept,
            Some(Verdict::Drop) => Expression::Drop,
            Some(Verdict::Other) | None => Expression::Other,
        },
        // NFTA_TARGET_NAME: what iptables-nft could not translate.
        "target" if ["REJECT", "DROP"].contains(&text(attribute(data, 1)).as_str()) => Expression::Drop,
        "match" if text(attribute(data, 1)) == "comment" => Expression::Neutral,
        _ => Expression::Other,
    }
}

/// The elements in an answer to `NFT_MSG_GETSETELEM`: NFTA_SET_ELEM_LIST_ELEMENTS { NFTA_LIST_ELEM { _KEY, _DATA } }
pub fn elements(answer: &[u8]) -> Elements {
    let list = attribute(answer, 3).unwrap_or_default();
    let one = |element: &[u8]| Some((attribute(element, 1).and_then(value)?, attribute(element, 2).and_then(verdict)));
    attributes(list).filter_map(|(_, element)| one(element)).collect()
}

/// NFTA_DATA_VALUE, of the host's byte order.
fn value(data: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(attribute(data, 1)?.try_into().ok()?))
}

/// NFTA_DATA_VERDICT { NFTA_VERDICT_CODE }
fn verdict(data: &[u8]) -> Option<Verdict> {
    let code = attribute(attribute(data, 2)?, 1).and_then(be32)?;
    Some(match i32::from_be_bytes(code.to_be_bytes()) {
        libc::NF_ACCEPT => Verdict::Accept,
        libc::NF_DROP => Verdict::Drop,
        _ => Verdict::Other,
    })
}

fn attribute(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
}

fn text(value: Option<&[u8]>) -> String {
    value.map(netlink::text).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use Expression::{Accept, Drop, Match, Neutral, Other, StateVerdicts, States};

    const INVALID: u32 = 1;
    const NEW: u32 = 1 << 3;

    #[test]
    fn what_a_rule_does_to_an_established_connection_is_known_only_where_it_is_sure() {
        let sorted = |established| StateVerdicts(vec![(ESTABLISHED, established), (INVALID, Verdict::Drop)]);
        for (rule, expected) in [
            (vec![], Effect::Nothing),
            (vec![Neutral], Effect::Nothing),
            (vec![Match, Neutral], Effect::Nothing),
            (vec![Match, Accept], Effect::Nothing),
            (vec![States(NEW), Match, Accept], Effect::Nothing),
            (vec![Neutral, Accept], Effect::AcceptsAll),
            (vec![States(ESTABLISHED | NEW), Neutral, Accept], Effect::AcceptsEstablished),
            (vec![States(ESTABLISHED), Match, Accept], Effect::Nothing),
            (vec![States(INVALID), Drop], Effect::OthersOnly),
            (vec![States(INVALID | ESTABLISHED), Drop], Effect::Decides),
            (vec![States(NEW), Other, Drop], Effect::OthersOnly),
            (vec![Match, Drop], Effect::Decides),
            (vec![Other, Accept], Effect::Decides),
            (vec![Other], Effect::Decides),
            (vec![sorted(Verdict::Accept)], Effect::AcceptsEstablishedOnly),
            (vec![sorted(Verdict::Drop)], Effect::Decides),
            (vec![Match, sorted(Verdict::Accept)], Effect::Decides),
        ] {
            assert_eq!(effect(&rule), expected, "{rule:?}");
        }
    }

    #[test]
    fn bytes_of_no_rule_make_no_panic() {
        for length in 0..64 {
            let bytes: Vec<u8> = (0..length).map(|at| at as u8 | 4).collect();
            expressions(&bytes, |_| None);
            elements(&bytes);
        }
    }
}
