// A page that answers a form takes the address of the page that it is, so that loading it again sends no form.
"use strict";
if (location.pathname !== document.body.dataset.at) history.replaceState(null, "", document.body.dataset.at);
