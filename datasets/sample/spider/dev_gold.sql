SELECT count(*) FROM loan	loan_book
SELECT max(rate) FROM loan	loan_book
SELECT name ,  income FROM customer	loan_book
SELECT status ,  count(*) FROM loan GROUP BY status	loan_book
SELECT T1.name FROM customer AS T1 JOIN loan AS T2 ON T1.customer_id  =  T2.customer_id WHERE T2.status  =  'late'	loan_book
SELECT city FROM branch ORDER BY opened_year LIMIT 1	loan_book
SELECT count(*) FROM supplier	warehouse
SELECT avg(unit_price) FROM product	warehouse
SELECT name FROM product WHERE unit_price  <  10	warehouse
SELECT count(*) FROM site	warehouse
SELECT country ,  count(*) FROM supplier GROUP BY country	warehouse
SELECT T1.name FROM product AS T1 JOIN stock AS T2 ON T1.product_id  =  T2.product_id JOIN site AS T3 ON T2.site_id  =  T3.site_id WHERE T3.city  =  'Lorne'	warehouse
