/** Numbers and times for people, in the page's language. */

export function bytes(value: number): string {
  if (value >= 1e9) return `${(value / 1e9).toFixed(value >= 1e10 ? 0 : 1)} GB`;
  if (value >= 1e6) return `${(value / 1e6).toFixed(value >= 1e7 ? 0 : 1)} MB`;
  if (value >= 1e3) return `${(value / 1e3).toFixed(0)} kB`;
  return `${value} B`;
}

export function count(value: number): string {
  if (value >= 1e9) return `${(value / 1e9).toFixed(1)} B`;
  if (value >= 1e6) return `${(value / 1e6).toFixed(1)} M`;
  return value.toLocaleString('en-US');
}

export function percent(share: number): string {
  const value = 100 * share;
  return `${value >= 10 ? value.toFixed(0) : value >= 0.1 ? value.toFixed(1) : value.toPrecision(1)}%`;
}

/** 45 s, 3 min 20 s, 2 h 5 min; in Korean 45초, 3분 20초, 2시간 5분. */
export function duration(seconds: number, language: string): string {
  const whole = Math.max(0, Math.round(seconds));
  const [h, m, s] = [Math.floor(whole / 3600), Math.floor((whole % 3600) / 60), whole % 60];
  const korean = language.startsWith('ko');
  const unit = (value: number, en: string, ko: string) => (korean ? `${value}${ko}` : `${value} ${en}`);
  if (h > 0) return [unit(h, 'h', '시간'), ...(m > 0 ? [unit(m, 'min', '분')] : [])].join(' ');
  if (m > 0) return [unit(m, 'min', '분'), ...(s > 0 && m < 10 ? [unit(s, 's', '초')] : [])].join(' ');
  return unit(s, 's', '초');
}

/** "3 minutes ago". `now` in unix seconds, as the API has times. */
export function ago(at: number, language: string, now = Date.now() / 1000): string {
  return relative(-Math.max(0, now - at), language);
}

/** "in 3 days"; what has passed already: "3 days ago". */
export function until(at: number, language: string, now = Date.now() / 1000): string {
  return relative(at - now, language);
}

function relative(seconds: number, language: string): string {
  const format = new Intl.RelativeTimeFormat(language, { numeric: 'auto' });
  const size = Math.abs(seconds);
  if (size < 60) return format.format(Math.round(seconds), 'second');
  if (size < 3600) return format.format(Math.round(seconds / 60), 'minute');
  if (size < 86_400) return format.format(Math.round(seconds / 3600), 'hour');
  return format.format(Math.round(seconds / 86_400), 'day');
}

export function clockTime(at: number, language: string): string {
  return new Date(at * 1000).toLocaleTimeString(language, { hour: '2-digit', minute: '2-digit', second: '2-digit' });
}

export function dateTime(at: number, language: string): string {
  return new Date(at * 1000).toLocaleString(language, { dateStyle: 'medium', timeStyle: 'short' });
}
