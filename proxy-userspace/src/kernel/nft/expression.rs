//! Rules and their expressions as libnftnl's objects: built, written into a message, read from one, printed.

use std::{
    alloc::{Layout, handle_alloc_error},
    ffi::{CStr, CString, c_char},
    ptr::NonNull,
};

use nftnl::nftnl_sys as sys;

use super::NftError;

/// The kernel's limit on the expressions of a rule (`NFT_RULE_MAXEXPRS`).
const MAX_EXPRESSIONS: usize = 128;
/// No name in nf_tables is longer (`NFT_NAME_MAXLEN`, with its NUL).
const MAX_NAME: usize = 256;
/// A value in an expression is at most one register wide.
const MAX_DATA: usize = 16;
/// Words of the buffer a rule is written into. The biggest expression has one name, a nested expression and some ten
/// small attributes: less than 512 bytes; [`MAX_EXPRESSIONS`] of them, three names and the headers stay below 128 KiB.
const RULE_WORDS: usize = 128 * 1024 / 8;

/// One expression, `struct nftnl_expr`.
#[derive(Debug)]
pub struct Expression(NonNull<sys::nftnl_expr>);

impl Expression {
    /// `name` is one that libnftnl 1.2.4 knows.
    pub fn new(name: &'static CStr) -> Self {
        // SAFETY: `name` ends with a NUL; libnftnl copies what it keeps.
        let raw = unsafe { sys::nftnl_expr_alloc(name.as_ptr()) };
        match NonNull::new(raw) {
            Some(raw) => Self(raw),
            // libnftnl knows the names used here, so only memory can be missing.
            None => handle_alloc_error(Layout::new::<[u64; 8]>()),
        }
    }

    /// An attribute that libnftnl keeps as `uint32_t`.
    pub fn u32(self, attribute: u32, value: u32) -> Self {
        // SAFETY: the object lives; the attribute numbers fit 16 bits and name 32-bit fields of this expression.
        unsafe { sys::nftnl_expr_set_u32(self.0.as_ptr(), attribute as u16, value) };
        self
    }

    /// An attribute that libnftnl keeps as `uint64_t`.
    pub fn u64(self, attribute: u32, value: u64) -> Self {
        // SAFETY: as in `u32`, for a 64-bit field.
        unsafe { sys::nftnl_expr_set_u64(self.0.as_ptr(), attribute as u16, value) };
        self
    }

    /// An attribute that libnftnl keeps as `uint8_t`.
    pub fn u8(self, attribute: u32, value: u8) -> Self {
        // SAFETY: as in `u32`, for an 8-bit field.
        unsafe { sys::nftnl_expr_set_u8(self.0.as_ptr(), attribute as u16, value) };
        self
    }

    /// An attribute that holds a value of a register, at most 16 bytes.
    pub fn data(self, attribute: u32, value: &[u8]) -> Self {
        let value = value.get(..MAX_DATA).unwrap_or(value);
        // SAFETY: libnftnl copies `value.len()` bytes, at most 16, into a field of 64 (`union nftnl_data_reg`).
        unsafe {
            sys::nftnl_expr_set(self.0.as_ptr(), attribute as u16, value.as_ptr().cast(), value.len() as u32);
        }
        self
    }

    /// An attribute that is a name.
    pub fn name(self, attribute: u32, value: &str) -> Result<Self, NftError> {
        let text = c_name(value)?;
        // SAFETY: `text` ends with a NUL and is copied.
        unsafe { sys::nftnl_expr_set_str(self.0.as_ptr(), attribute as u16, text.as_ptr()) };
        Ok(self)
    }

    /// Puts `inner` inside, as `dynset` wants it.
    pub fn nested(self, attribute: u32, inner: Expression) -> Self {
        // SAFETY: both live; libnftnl takes `inner` over and frees it with `self`, so it must not be dropped here.
        unsafe { sys::nftnl_expr_set(self.0.as_ptr(), attribute as u16, inner.0.as_ptr().cast(), 0) };
        std::mem::forget(inner);
        self
    }

    /// libnftnl's own words for it, such as `lookup reg 1 set r4 dreg 1`.
    pub fn print(&self) -> String {
        // SAFETY: the object lives.
        unsafe { print(self.0.as_ptr()) }
    }
}

impl Drop for Expression {
    fn drop(&mut self) {
        // SAFETY: made by `nftnl_expr_alloc`, not given away, freed once.
        unsafe { sys::nftnl_expr_free(self.0.as_ptr()) }
    }
}

/// # Safety
/// `expression` points to a live expression.
unsafe fn print(expression: *const sys::nftnl_expr) -> String {
    let mut buffer = [0u8; 4096];
    // SAFETY: the caller's promise; libnftnl writes at most `buffer.len()` bytes and a NUL within them.
    unsafe {
        let name = sys::nftnl_expr_get_str(expression, sys::NFTNL_EXPR_NAME as u16);
        let room = buffer.len();
        sys::nftnl_expr_snprintf(buffer.as_mut_ptr().cast::<c_char>(), room, expression, sys::NFTNL_OUTPUT_DEFAULT, 0);
        let name = if name.is_null() { c"" } else { CStr::from_ptr(name) };
        let body = CStr::from_bytes_until_nul(&buffer).unwrap_or(c"");
        format!("{} {}", name.to_string_lossy(), body.to_string_lossy().trim())
    }
}

fn c_name(name: &str) -> Result<CString, NftError> {
    if name.is_empty() || name.len() >= MAX_NAME {
        return Err(NftError::Name(name.to_owned()));
    }
    CString::new(name).map_err(|_| NftError::Name(name.to_owned()))
}

/// A rule, `struct nftnl_rule`.
#[derive(Debug)]
pub struct RuleObject(NonNull<sys::nftnl_rule>);

impl RuleObject {
    fn alloc() -> Self {
        // SAFETY: no arguments.
        match NonNull::new(unsafe { sys::nftnl_rule_alloc() }) {
            Some(raw) => Self(raw),
            None => handle_alloc_error(Layout::new::<[u64; 16]>()),
        }
    }

    /// A rule of `chain`, in `table`, family `inet`.
    pub fn new(table: &str, chain: &str, expressions: Vec<Expression>) -> Result<Self, NftError> {
        if expressions.len() > MAX_EXPRESSIONS {
            return Err(NftError::RuleTooLong { chain: chain.to_owned() });
        }
        let (table, chain) = (c_name(table)?, c_name(chain)?);
        let rule = Self::alloc();
        // SAFETY: the rule lives; the strings end with a NUL and are copied.
        unsafe {
            sys::nftnl_rule_set_str(rule.0.as_ptr(), sys::NFTNL_RULE_TABLE as u16, table.as_ptr());
            sys::nftnl_rule_set_str(rule.0.as_ptr(), sys::NFTNL_RULE_CHAIN as u16, chain.as_ptr());
        }
        for expression in expressions {
            // SAFETY: both live; the rule takes the expression over and frees it, so it must not be dropped here.
            unsafe { sys::nftnl_rule_add_expr(rule.0.as_ptr(), expression.0.as_ptr()) };
            std::mem::forget(expression);
        }
        Ok(rule)
    }

    /// The rule as a whole message of that type and flags, sequence number 0.
    pub fn message(&self, kind: u16, flags: u16) -> Vec<u8> {
        let mut words = vec![0u64; RULE_WORDS];
        // SAFETY: the buffer is zeroed, aligned to 8 and holds the biggest rule `new` lets through (see `RULE_WORDS`);
        // libnftnl writes the header and the attributes from its beginning on.
        unsafe {
            let family = libc::NFPROTO_INET as u16;
            let header = sys::nftnl_nlmsg_build_hdr(words.as_mut_ptr().cast::<c_char>(), kind, family, flags, 0);
            sys::nftnl_rule_nlmsg_build_payload(header, self.0.as_ptr());
        }
        let mut length = [0; 4];
        length.iter_mut().zip(words.iter().flat_map(|word| word.to_ne_bytes())).for_each(|(to, from)| *to = from);
        words.iter().flat_map(|word| word.to_ne_bytes()).take(u32::from_ne_bytes(length) as usize).collect()
    }

    /// From a message of the kernel; `None` when it has an expression libnftnl does not know.
    pub fn parse(message: &[u8]) -> Option<Self> {
        let length = message.first_chunk().copied().map(u32::from_ne_bytes)?;
        if message.len() < super::HEADER_AND_FIXED || length as usize != message.len() {
            return None;
        }
        let words: Vec<u64> = message
            .chunks(8)
            .map(|chunk| {
                let mut word = [0; 8];
                word.iter_mut().zip(chunk).for_each(|(to, from)| *to = *from);
                u64::from_ne_bytes(word)
            })
            .collect();
        let rule = Self::alloc();
        // SAFETY: an aligned copy of a message whose length in its header is the buffer's own; libmnl checks every
        // attribute's length against it, and libnftnl copies what it keeps.
        let result = unsafe { sys::nftnl_rule_nlmsg_parse(words.as_ptr().cast(), rule.0.as_ptr()) };
        (result >= 0).then_some(rule)
    }

    /// The expressions in order, printed.
    pub fn print(&self) -> Vec<String> {
        let mut printed = Vec::new();
        // SAFETY: the rule lives and is not changed while the iterator does; the iterator is freed at the end.
        unsafe {
            let iterator = sys::nftnl_expr_iter_create(self.0.as_ptr());
            if iterator.is_null() {
                handle_alloc_error(Layout::new::<[u64; 2]>());
            }
            loop {
                let expression = sys::nftnl_expr_iter_next(iterator);
                if expression.is_null() {
                    break;
                }
                printed.push(print(expression));
            }
            sys::nftnl_expr_iter_destroy(iterator);
        }
        printed
    }
}

impl Drop for RuleObject {
    fn drop(&mut self) {
        // SAFETY: made by `nftnl_rule_alloc`, freed once; it frees its expressions.
        unsafe { sys::nftnl_rule_free(self.0.as_ptr()) }
    }
}
