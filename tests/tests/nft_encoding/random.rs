//! Random sets with random elements in them.

use std::{collections::BTreeMap, net::IpAddr};

use proptest::{collection, option, prelude::*};
use proxy_core::{config::Protocol, ruleset::*};

pub fn sets() -> impl Strategy<Value = BTreeMap<String, Set>> {
    collection::btree_map("[a-z][a-z0-9_-]{0,20}", prop_oneof![3 => exact(), 1 => ranges()], 1..6)
}

fn field() -> impl Strategy<Value = Field> {
    use Field::*;
    prop::sample::select(vec![Mark, Ipv4, Ipv6, Protocol, Port, Slot])
}

fn data() -> impl Strategy<Value = Option<Data>> {
    use Data::*;
    option::of(prop::sample::select(vec![Mark, Verdict, Ipv4, Ipv6, Ipv4Port, Ipv6Port]))
}

fn part(field: Field) -> BoxedStrategy<KeyPart> {
    match field {
        Field::Mark => any::<u32>().prop_map(KeyPart::Mark).boxed(),
        Field::Slot => any::<u32>().prop_map(KeyPart::Slot).boxed(),
        Field::Ipv4 => any::<[u8; 4]>().prop_map(|ip| KeyPart::Address(IpAddr::from(ip))).boxed(),
        Field::Ipv6 => any::<[u8; 16]>().prop_map(|ip| KeyPart::Address(IpAddr::from(ip))).boxed(),
        Field::Protocol => prop::sample::select(vec![Protocol::Tcp, Protocol::Udp]).prop_map(KeyPart::Protocol).boxed(),
        Field::Port => any::<u16>().prop_map(KeyPart::Port).boxed(),
    }
}

fn value(data: Option<Data>) -> BoxedStrategy<Value> {
    let ipv4 = any::<[u8; 4]>().prop_map(IpAddr::from);
    let ipv6 = any::<[u8; 16]>().prop_map(IpAddr::from);
    match data {
        None => Just(Value::None).boxed(),
        Some(Data::Mark) => any::<u32>().prop_map(Value::Mark).boxed(),
        Some(Data::Verdict) => {
            prop::sample::select(vec![Value::Goto("target".into()), Value::Jump("target".into())]).boxed()
        }
        Some(Data::Ipv4) => ipv4.prop_map(Value::Address).boxed(),
        Some(Data::Ipv6) => ipv6.prop_map(Value::Address).boxed(),
        Some(Data::Ipv4Port) => (ipv4, any::<u16>()).prop_map(|it| Value::Endpoint(it.into())).boxed(),
        Some(Data::Ipv6Port) => (ipv6, any::<u16>()).prop_map(|it| Value::Endpoint(it.into())).boxed(),
    }
}

fn element(data: Option<Data>, counter: bool) -> impl Strategy<Value = Element> {
    let counts = if counter { any::<(u32, u32)>().boxed() } else { Just((0, 0)).boxed() };
    let comment = option::of("[^\\x00]{0,31}");
    (value(data), comment, counts).prop_map(|(value, comment, (packets, bytes))| Element {
        last: None,
        value,
        comment: comment.map(Into::into),
        counter: Counter { packets: packets.into(), bytes: bytes.into() },
    })
}

/// As long as a [`Key`] can be: two IPv6 addresses.
fn fields() -> impl Strategy<Value = Vec<Field>> {
    let length = |field: &Field| if *field == Field::Ipv6 { 16 } else { 4 };
    collection::vec(field(), 1..5).prop_map(move |mut fields| {
        while fields.iter().map(length).sum::<usize>() > 32 {
            fields.pop();
        }
        fields
    })
}

fn exact() -> impl Strategy<Value = Set> {
    (fields(), data(), any::<bool>()).prop_flat_map(|(key, data, counter)| {
        let keys: Vec<_> = key.iter().map(|field| part(*field)).collect();
        let keys = keys.prop_map(|parts| Key::new(&parts));
        let spec = SetSpec { key, data, kind: SetKind::Hash, counter };
        collection::btree_map(keys, element(data, counter), 0..200)
            .prop_map(move |elements| Set { spec: spec.clone(), elements })
    })
}

/// Ranges between sorted numbers: some touch, some have one key, the first and the last key there is come up often.
fn ranges() -> impl Strategy<Value = Set> {
    let field = prop::sample::select(vec![Field::Ipv4, Field::Ipv6, Field::Port]);
    (field, data(), any::<bool>()).prop_flat_map(|(field, data, counter)| {
        let bits = match field {
            Field::Ipv6 => 128,
            Field::Port => 16,
            Field::Ipv4 | Field::Mark | Field::Protocol | Field::Slot => 32,
        };
        let last = u128::MAX >> (128 - bits);
        let border = prop_oneof![8 => 0..=last, 1 => Just(0), 1 => Just(last), 2 => 0..=last.min(40)];
        let spec = SetSpec { key: vec![field], data, kind: SetKind::Interval, counter };
        let borders = collection::btree_set(border, 0..60);
        (borders, collection::vec((element(data, counter), any::<bool>()), 60)).prop_map(move |(borders, elements)| {
            let spec = spec.clone();
            Set { spec, elements: between(field, &borders.into_iter().collect::<Vec<_>>(), elements) }
        })
    })
}

fn between(field: Field, borders: &[u128], elements: Vec<(Element, bool)>) -> BTreeMap<Key, Element> {
    let key = |number: u128| {
        Key::new(&[match field {
            Field::Ipv6 => KeyPart::Address(IpAddr::from(number.to_be_bytes())),
            Field::Port => KeyPart::Port(u16::try_from(number).expect("a port")),
            Field::Ipv4 | Field::Mark | Field::Protocol | Field::Slot => {
                KeyPart::Address(IpAddr::from(u32::try_from(number).expect("an address").to_be_bytes()))
            }
        }])
    };
    let mut ranges = BTreeMap::new();
    for (pair, (element, touching)) in borders.windows(2).zip(elements) {
        if let [first, next] = *pair {
            let last = if touching { next - 1 } else { first + (next - 1 - first) / 2 };
            ranges.insert(key(first), Element { last: Some(key(last)), ..element });
        }
    }
    // The last border is a range of one key.
    if let ([.., last], Some(template)) = (borders, ranges.values().next().cloned()) {
        ranges.insert(key(*last), Element { last: Some(key(*last)), ..template });
    }
    ranges
}
