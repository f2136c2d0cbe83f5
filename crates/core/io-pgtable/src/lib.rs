//! I/O page tables: each format a file of facts, one walker for all.
