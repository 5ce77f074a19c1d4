import { Select } from '@mantine/core';
import { useTranslation } from 'react-i18next';

const DAY_S = 86_400;
const TERMS = {
  hour: 3_600,
  day: DAY_S,
  week: 7 * DAY_S,
  month: 30 * DAY_S,
  quarter: 90 * DAY_S,
  year: 365 * DAY_S,
} as const;

interface Props {
  label: string;
  value: number | null; // seconds from now; null: never
  onChange: (seconds: number | null) => void;
}

/** When something that is made now ends by itself. */
export function Ends({ label, value, onChange }: Props) {
  const { t } = useTranslation();
  const terms = Object.entries(TERMS) as [keyof typeof TERMS, number][];
  return (
    <Select
      label={label}
      value={String(value ?? '')}
      onChange={(chosen) => onChange(chosen ? Number(chosen) : null)}
      data={[
        { value: '', label: t('app.endsNever') },
        ...terms.map(([name, seconds]) => ({ value: String(seconds), label: t(`app.ends_${name}`) })),
      ]}
      allowDeselect={false}
    />
  );
}
