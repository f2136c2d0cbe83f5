//! AMD-Vi: layouts, driver and register-level model.
