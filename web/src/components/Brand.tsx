import { useTranslation } from 'react-i18next';
import css from './Brand.module.css';

export function Brand() {
  const { t } = useTranslation();
  return (
    <span className={css.brand}>
      <img src="/icon.svg" width={28} height={28} alt="" />
      <span>{t('app.name')}</span>
    </span>
  );
}
