"use strict";
// Which page it is.

keys.view["← →"] = ["In a chart, heat map or map: move", () => {}];
if (data.comparison) comparisonPage(data.comparison);
else runPage(data.runs);
